"""How fast texts are made, beside the same texts made one by one.

    python -m bench.generate

All contenders have the same weights, features and prompts, take the likeliest token, and make the
same texts. The language model is that of `bench.step`: a Phi in miniature, with Phi-2's vocabulary
and random weights in float32. Such a model never stops, so all texts are equally long.

    ours                  batches, keys and values of earlier tokens kept (`train.model.generate`)
    one by one            the same for one text at a time, with the model as transformers has it
    one by one, no cache  the whole sequence again for every token, logits at its end only
"""

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PhiConfig

from bench.command import benchmark_parser, run_benchmark
from bench.measure import at_least, interleaved, medians, print_goals, print_table, rate_of, summary
from bench.opening import resident
from bench.step import (
    PHI,
    PRETRAIN,
    SMALL_PHI,
    Stage,
    as_published,
    make_features,
    make_stage,
    print_memory,
    shape_of,
)
from bench.stores import SPEC
from bench.texts import EOS_ID, bare_format
from train.data.prompts import encode
from train.model.attention import NAME as OUR_ATTENTION
from train.model.captioner import use_fused_gelu
from train.model.generate import generate

OURS, ONE_BY_ONE, NO_CACHE = "ours", "one by one", "one by one, no cache"

CONTENDERS = (OURS, ONE_BY_ONE, NO_CACHE)
BATCH = 64
PROMPT_TOKENS = 17
"""Of `Instruct: Provide a one-sentence caption for the provided image.` and what stands around."""
MAX_TOKENS = 20
"""Of a text; COCO's captions have 7 to 26 (`bench.texts`)."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    texts: dict[str, int]
    """Of a round, by contender: fewer of those that take long. The images are the first ones."""
    phi: PhiConfig
    rounds: int
    watched: int | None
    """Of how many contenders the memory is taken, each in a fresh process; None: of all."""


FULL = Sizes({OURS: 64, ONE_BY_ONE: 8, NO_CACHE: 4}, PHI, rounds=5, watched=None)
QUICK = Sizes({OURS: 4, ONE_BY_ONE: 2, NO_CACHE: 1}, SMALL_PHI, rounds=1, watched=1)

LEAST = {NO_CACHE: 5.0}
"""The goal: we are so many times as fast."""

Texts = list[str]


def prompt() -> str:
    """Return what stands between an image's patches and the text: the same words for all."""
    words = np.random.default_rng(0).integers(0, EOS_ID, PROMPT_TOKENS)
    return " ".join(f"w{word}" for word in words)


def make_contender(name: str, stage: Stage, num_texts: int) -> Callable[[], Texts]:
    """Return what makes the texts of a round.

    Args:
        name: One of `CONTENDERS`.
        stage: Model, tokenizer and features.
        num_texts: Of a round.
    """
    if name == NO_CACHE:
        return partial(without_cache, stage, num_texts)
    batch_size = BATCH if name == OURS else 1
    return partial(with_cache, stage, num_texts, batch_size, published=name != OURS)


def with_cache(stage: Stage, num_texts: int, batch_size: int, *, published: bool) -> Texts:
    """Make texts with `train.model.generate`, with the model as published or as ours."""
    as_published(stage.model.language_model)
    if not published:
        stage.model.language_model.set_attn_implementation(OUR_ATTENTION)
        use_fused_gelu(stage.model.language_model)
    made = generate(
        stage.model,
        bare_format(stage.tokenizer),
        stage.store,
        range(num_texts),
        [prompt()] * num_texts,
        max_tokens=MAX_TOKENS,
        batch_size=batch_size,
        description="texts",
    )
    return [one.text for one in made]


@torch.inference_mode()
def without_cache(stage: Stage, num_texts: int) -> Texts:
    """Make texts one by one, each token by a pass over all tokens before it."""
    as_published(stage.model.language_model)
    stage.model.eval()
    prompt_ids = encode([prompt()], stage.tokenizer)
    texts = []
    for image_id in range(num_texts):
        patches_1PD = torch.from_numpy(stage.store.gather(np.array([image_id])))
        patches_1PH = stage.model.embed_patches(patches_1PD)
        token_ids = list(prompt_ids[0])
        for _ in range(MAX_TOKENS):
            token_ids.append(next_token(stage, patches_1PH, token_ids))
        texts.append(stage.tokenizer.decode(token_ids[PROMPT_TOKENS:]))
    return texts


def next_token(stage: Stage, patches_1PH: Tensor, token_ids: list[int]) -> int:
    """Return the likeliest token of the vocabulary behind patches and tokens."""
    embeds_1TH = stage.model.embed_text(torch.tensor([token_ids]))
    logits_11V = stage.model.language_model(
        inputs_embeds=torch.cat([patches_1PH, embeds_1TH], 1), use_cache=False, logits_to_keep=1
    ).logits
    return int(logits_11V[0, -1, : len(stage.tokenizer)].argmax())


def check_same(texts: Mapping[str, Texts]) -> int:
    """Check that all contenders made the same texts of the same images, of the same length.

    Args:
        texts: Contender to what it made of the first images.

    Returns:
        How many texts of ours differ from one another.
    """
    ours = texts[OURS]
    for name, theirs in texts.items():
        assert theirs == ours[: len(theirs)], f"{name} made other texts than ours"
        assert {len(text.split()) for text in theirs} == {MAX_TOKENS}, f"{name}: a text ended"
    return len(set(ours))


def peak_memory(contender: str, folder: Path, sizes: Sizes) -> dict[str, float]:
    """Make the texts of a round in this process; return MiB before it and at most."""
    stage = make_stage(PRETRAIN, folder, sizes.phi)
    make = make_contender(contender, stage, sizes.texts[contender])
    # From here on VmHWM counts anew: what making the weights took is not the texts'.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    make()
    peak = resident("VmHWM")
    return {"before": round(before / 2**20), "peak": round(peak / 2**20)}


def peaks(folder: Path, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return the memory of all contenders, each in a fresh process."""
    found = {}
    for contender in CONTENDERS[: sizes.watched]:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found[contender] = process.submit(peak_memory, contender, folder, sizes).result()
    return found


def compare_contenders(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return the figures of the result file, and print the table."""
    memory = peaks(folder, sizes)
    stage = make_stage(PRETRAIN, folder, sizes.phi)
    contenders = {name: make_contender(name, stage, sizes.texts[name]) for name in CONTENDERS}
    different = check_same({name: make() for name, make in contenders.items()})
    works = {name: rate_of(partial(count, make)) for name, make in contenders.items()}
    # Making them once to compare them has warmed all of them up.
    rates = interleaved(works, sizes.rounds, uncounted=0)
    median = medians(rates)
    print_table("generate", "texts", median)
    print_memory(memory)
    return {
        "unit": "texts/s",
        **summary(rates),
        "tokens_per_second": {name: round(rate * MAX_TOKENS, 1) for name, rate in median.items()},
        "ours is so many times as fast": {
            name: round(median[OURS] / rate, 2) for name, rate in median.items() if name != OURS
        },
        "memory_mib": memory,
        "different texts": different,
    }


def count(make: Callable[[], Texts]) -> int:
    """Make texts and return how many."""
    return len(make())


def goals_of(median: Mapping[str, float]) -> dict[str, Any]:
    """Return what was wanted and what was found."""
    return {
        f"{OURS} / {name}": at_least(wanted, median[OURS] / median[name])
        for name, wanted in LEAST.items()
    }


def measure(sizes: Sizes) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    with tempfile.TemporaryDirectory() as folder:
        features = make_features(Path(folder), max(sizes.texts.values()))
        found = compare_contenders(features, sizes)
    goals = goals_of(found["median"])
    print_goals(goals)
    return {
        "setting": {
            "language_model": shape_of(sizes.phi),
            "dtype": "float32",
            "projector": "mlp",
            "patches": SPEC.patches,
            "prompt_tokens": PROMPT_TOKENS,
            "tokens": MAX_TOKENS,
            "texts": sizes.texts,
            "batch": BATCH,
        },
        "rounds": sizes.rounds,
        **found,
        "goals": goals,
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "generate",
        lambda arguments: measure(QUICK if arguments.quick else FULL),
        benchmark_parser(__doc__),
        minutes=3,
        quick_seconds=30,
        libraries=("torch", "transformers"),
    )


if __name__ == "__main__":
    main()
