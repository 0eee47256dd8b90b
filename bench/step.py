"""How fast an optimizer step is, beside the same step as other loops make it.

    python -m bench.step

All contenders of a stage have the same weights, texts and features, or as many pictures, and each
makes a whole step: from texts and image ids to changed weights. The learning rate is 0, so that
all of them find the same weights at all times. The language model is a Phi in miniature, with
Phi-2's vocabulary and random weights in float32; `bench.step_llama` has a deeper and narrower one.

    ours              rows that share their patches, logits where they are needed, cached features
    usual loop        one padded sequence a text, all logits, cached features (`bench.usual_loop`)
    ... by length     the same, with texts of like length in a batch, which pads less
    ... with CLIP     the usual loop with CLIP on decoded pictures at every step, none ahead
    student's loop    a forward pass for every token of a caption (`bench.student_loop`)

Stage 1 has captions of COCO's lengths; stage 2 has conversations of LLaVA's (`bench.texts`).
"""

import copy
import math
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
from transformers import (
    AutoModelForCausalLM,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from bench import student_loop, usual_loop
from bench.command import benchmark_parser, run_benchmark
from bench.extract import jpeg
from bench.measure import (
    at_least,
    at_most,
    interleaved,
    medians,
    print_goals,
    print_table,
    rate_of,
    summary,
)
from bench.opening import resident
from bench.stores import SPEC, make_store
from bench.texts import (
    EOS_ID,
    TOKENS,
    bare_format,
    draw_captions,
    draw_conversations,
    make_tokenizer,
)
from bench.usual_loop import ClipInTheLoop, Sample, by_length, cached, make_samples, shuffled
from cache import FeatureStore, Spec
from train.data.examples import Example
from train.data.prefetch import Prefetcher
from train.loop.step import StepData, build_step, optimizer_step
from train.model.attention import NAME as OUR_ATTENTION
from train.model.captioner import CaptionModel, use_fused_gelu
from train.model.decoder import blocks_of
from train.model.language_model import add_lora
from train.model.projector import seeded_projector
from train.settings import LoraSettings

OURS, USUAL, BY_LENGTH = "ours", "usual loop", "usual loop, by length"
WITH_CLIP, STUDENT = "usual loop, with CLIP", "student's loop"

PRETRAIN, FINETUNE = "pretrain", "finetune"
Contenders = Mapping[str, tuple[str, ...]]
CONTENDERS: Contenders = {
    PRETRAIN: (OURS, USUAL, BY_LENGTH, WITH_CLIP, STUDENT),
    FINETUNE: (OURS, USUAL, BY_LENGTH),
}
UNITS = {PRETRAIN: "captions", FINETUNE: "conversations"}

PASS_TOKENS, ROW_TOKENS = 2048, 256
"""Of one of our forward passes and its rows: short ones, which suit SDPA on a CPU."""
USUAL_BATCH = {PRETRAIN: 32, FINETUNE: 8}
"""Texts of a forward pass of the usual loop."""
STUDENT_CAPTIONS = 8
"""Of a student's step, which takes so long that no more are measured."""
PICTURES = 32
"""How many pictures differ."""

PHI = PhiConfig(
    vocab_size=51_200,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=6,
    num_attention_heads=16,
    max_position_embeddings=2048,
    partial_rotary_factor=0.5,
)
SMALL = {"hidden_size": 64, "num_hidden_layers": 2}
SMALL_PHI = PhiConfig(**PHI.to_dict() | SMALL)
LORA = LoraSettings(r=16, alpha=32, dropout=0.0)
"""Without dropout, so that gradients can be compared."""

LEAST = {
    PRETRAIN: {USUAL: 4.0, WITH_CLIP: 5.0, STUDENT: 40.0},
    FINETUNE: {USUAL: 1.5},
}
"""The goals: we are so many times as fast."""
MOST_DIFFERENCE, MOST_WAITING = 1e-5, 0.02
"""The goals: relative difference of the gradients, share of the time waiting for data."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    images: dict[str, int]
    """Of one optimizer step, by stage."""
    config: PreTrainedConfig
    """Of the language model."""
    contenders: Contenders
    rounds: int
    wait_steps: int
    """Steps over which the share of time waiting for data is taken."""
    watched: int | None
    """Of how many contenders the memory is taken, each in a fresh process; None: of all."""


FULL = Sizes({PRETRAIN: 16, FINETUNE: 12}, PHI, CONTENDERS, rounds=5, wait_steps=8, watched=None)
QUICK = Sizes({PRETRAIN: 1, FINETUNE: 1}, SMALL_PHI, CONTENDERS, rounds=1, wait_steps=2, watched=1)


@dataclass(frozen=True)
class Stage:
    """What all contenders of a stage learn from."""

    name: str
    model: CaptionModel
    tokenizer: PreTrainedTokenizerBase
    store: FeatureStore
    examples: list[Example]
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Contender:
    """A way of making an optimizer step."""

    step: Callable[[], float]
    """Makes one and returns the mean loss of a supervised token."""
    texts: int
    """Texts of a step."""
    tokens: int
    """Supervised tokens of a step."""

    def work(self) -> int:
        """Make a step and return how many texts it learned from."""
        self.step()
        return self.texts


def make_features(folder: Path, num_images: int, spec: Spec = SPEC) -> Path:
    """Write a store of normally distributed features."""
    rng = np.random.default_rng(0)
    shape = (spec.patches, spec.width)
    return make_store(
        folder,
        num_images,
        lambda ids: rng.standard_normal((len(ids), *shape), np.float32).astype(np.float16),
        spec,
    )


def make_stage(name: str, folder: Path, config: PreTrainedConfig = PHI) -> Stage:
    """Make a stage's model and texts; everything is drawn from fixed seeds.

    Args:
        name: PRETRAIN or FINETUNE.
        folder: Store of the features.
        config: Of the language model.
    """
    store = FeatureStore(folder)
    torch.manual_seed(0)
    # A model notes in its config how it computes attention: the settings stay as they are.
    language_model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    language_model.requires_grad_(False).eval()
    if name == FINETUNE:
        add_lora(language_model, LORA, seed=0)
        for key, parameter in language_model.named_parameters():
            if "lora_B" in key:
                # Zero in a fresh LoRA, and then no gradient reaches the other matrix.
                torch.nn.init.normal_(parameter, std=0.02)
    model = CaptionModel(
        seeded_projector("mlp", store.spec.width, config.hidden_size, seed=0), language_model
    )
    learning = [p for p in model.parameters() if p.requires_grad]
    draw = draw_captions if name == PRETRAIN else draw_conversations
    # The last id of a vocabulary smaller than Phi-2's is its EOS.
    tokens, eos_id = min(TOKENS, config.vocab_size), min(EOS_ID, config.vocab_size - 1)
    return Stage(
        name,
        model,
        make_tokenizer(tokens, eos_id),
        store,
        draw(np.random.default_rng(0), len(store), eos_id),
        torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0),
    )


def our_steps(stage: Stage, num_steps: int) -> tuple[float, float]:
    """Make some steps as the training loop does, each on all images of the stage.

    Returns:
        Mean loss of a supervised token; share of the time waiting for data, 0 for one step.
    """
    stage.model.language_model.set_attn_implementation(OUR_ATTENTION)
    use_fused_gelu(stage.model.language_model)

    def build(_: int) -> StepData:
        return build_step(
            stage.examples,
            bare_format(stage.tokenizer),
            stage.store,
            pass_tokens=PASS_TOKENS,
            row_tokens=ROW_TOKENS,
            max_text_tokens=PASS_TOKENS,
            device=stage.model.device,
        )

    source = Prefetcher(build, range(num_steps))
    loss = 0.0
    for step, data in enumerate(source, start=1):
        loss_sum = optimizer_step(
            stage.model, stage.optimizer, data, clip_norm=math.inf, seed=(0, step)
        )
        loss = loss_sum / data.num_target_tokens
    return loss, source.wait_share


def make_contender(name: str, stage: Stage) -> Contender:
    """Make ready what a contender needs and measures with.

    Args:
        name: One of `CONTENDERS`.
        stage: Its model and texts.
    """
    samples = make_samples(stage.examples, stage.tokenizer)
    if name == STUDENT:
        return _student(stage, samples[:STUDENT_CAPTIONS])
    tokens = sum(sample.text.num_target_tokens for sample in samples)
    step = partial(_our_step, stage) if name == OURS else _usual_step(name, stage)
    return Contender(step, len(samples), tokens)


def _our_step(stage: Stage) -> float:
    return our_steps(stage, 1)[0]


def _usual_step(name: str, stage: Stage) -> Callable[[], float]:
    features = clip_in_the_loop() if name == WITH_CLIP else cached(stage.store)
    order = by_length if name == BY_LENGTH else shuffled

    def step() -> float:
        as_published(stage.model.language_model)
        return usual_loop.optimizer_step(
            stage.model.projector,
            stage.model.language_model,
            order(make_samples(stage.examples, stage.tokenizer)),
            features,
            stage.optimizer,
            USUAL_BATCH[stage.name],
        )

    return step


def _student(stage: Stage, samples: list[Sample]) -> Contender:
    features = clip_in_the_loop()

    def step() -> float:
        as_published(stage.model.language_model)
        return student_loop.optimizer_step(
            stage.model.projector, stage.model.language_model, samples, features, stage.optimizer
        )

    # EOS is never a target.
    tokens = sum(sample.text.num_target_tokens - 1 for sample in samples)
    return Contender(step, len(samples), tokens)


def as_published(language_model: PreTrainedModel) -> None:
    """Let the model compute as transformers has it, and as other loops use it."""
    language_model.set_attn_implementation("sdpa")
    for layer in blocks_of(language_model):
        if hasattr(layer.mlp, "activation_fn"):
            layer.mlp.activation_fn = ACT2FN[language_model.config.hidden_act]


def clip_in_the_loop() -> ClipInTheLoop:
    """Return CLIP with pictures of COCO's usual size."""
    return ClipInTheLoop([jpeg(seed) for seed in range(PICTURES)])


def gradient(stage: Stage, contender: Contender) -> Tensor:
    """Make a step and return the gradient of all that learns: float64 [N]."""
    contender.step()
    learning = [p for group in stage.optimizer.param_groups for p in group["params"]]
    return torch.cat([p.grad.double().flatten() for p in learning if p.grad is not None])


def difference(stage: Stage, found: Contender, wanted: Contender) -> float:
    """Return the relative difference of two contenders' gradients, in the L2 norm."""
    reference = gradient(stage, wanted)
    return float((gradient(stage, found) - reference).norm() / reference.norm())


def peak_memory(
    contender: str, stage: str, folder: Path, config: PreTrainedConfig
) -> dict[str, float]:
    """Make a step in this process, which has made none; return MiB before it and at most."""
    made = make_contender(contender, make_stage(stage, folder, config))
    # From here on VmHWM counts anew: what making the weights took is not the step's.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    made.step()
    peak = resident("VmHWM")
    return {"before": round(before / 2**20), "peak": round(peak / 2**20)}


def peaks(stage: str, folder: Path, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return the memory of a stage's contenders, each in a fresh process."""
    found = {}
    for contender in sizes.contenders[stage][: sizes.watched]:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            started = process.submit(peak_memory, contender, stage, folder, sizes.config)
            found[contender] = started.result()
    return found


def measure_stage(name: str, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Return what the result file says of a stage, and print its table."""
    memory = peaks(name, folder, sizes)
    stage = make_stage(name, folder, sizes.config)
    contenders = {c: make_contender(c, stage) for c in sizes.contenders[name]}
    losses = {c: contender.step() for c, contender in contenders.items()}
    works = {c: rate_of(made.work) for c, made in contenders.items()}
    rates = interleaved(works, sizes.rounds, uncounted=min(1, sizes.rounds - 1))
    median = medians(rates)
    print_table(f"step, {name}, {sizes.config.model_type}", UNITS[name], median)
    print_memory(memory)
    return {
        "unit": f"{UNITS[name]}/s",
        "setting": {
            "images": len(stage.examples),
            "texts": {c: made.texts for c, made in contenders.items()},
            "supervised_tokens": {c: made.tokens for c, made in contenders.items()},
        },
        **summary(rates),
        "supervised_tokens_per_second": {
            c: round(median[c] * made.tokens / made.texts, 1) for c, made in contenders.items()
        },
        "ours is so many times as fast": {
            c: round(median[OURS] / rate, 2) for c, rate in median.items() if c != OURS
        },
        "memory_mib": memory,
        "loss": losses,
        "gradient_difference": difference(stage, contenders[OURS], contenders[USUAL]),
        "wait_share": our_steps(stage, sizes.wait_steps)[1],
    }


def print_memory(memory: Mapping[str, Mapping[str, float]]) -> None:
    """Print the most that each contender's process held, and how much of it is its step's."""
    print("  MiB of a fresh process at most, and of them since before the step:")
    for contender, found in memory.items():
        growth = found["peak"] - found["before"]
        print(f"  {contender:<44} {found['peak']:>12,.0f} {growth:>8,.0f}")


def goals_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was wanted of both stages and what was found."""
    goals = {}
    for name, stage in found.items():
        for contender, wanted in LEAST[name].items():
            if contender in stage["median"]:
                ratio = stage["median"][OURS] / stage["median"][contender]
                goals[f"{name}: {OURS} / {contender}"] = at_least(wanted, ratio)
        goals |= {
            f"{name}: difference of the gradients, millionths": at_most(
                MOST_DIFFERENCE * 1e6, stage["gradient_difference"] * 1e6
            ),
            f"{name}: waiting for data, % of the time": at_most(
                MOST_WAITING * 100, stage["wait_share"] * 100
            ),
        }
    return goals


def shape_of(config: PreTrainedConfig) -> dict[str, int]:
    """Return the numbers of a language model that its speed depends on, for a result file."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    return {name: getattr(config, name) for name in (*names, "vocab_size")}


def measure(sizes: Sizes) -> dict[str, Any]:
    """Measure both stages of a model and print; return what the result file says of it."""
    found = {}
    for name, images in sizes.images.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure_stage(name, make_features(Path(folder), images), sizes)
    goals = goals_of(found)
    print_goals(goals)
    return {
        "setting": {
            "language_model": shape_of(sizes.config),
            "dtype": "float32",
            "projector": "mlp",
            "lora_r": LORA.r,
            "patches": SPEC.patches,
            "width": SPEC.width,
            "pass_tokens": PASS_TOKENS,
            "row_tokens": ROW_TOKENS,
            "usual_batch": USUAL_BATCH,
        },
        "rounds": sizes.rounds,
        **found,
        "goals": goals,
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "step",
        lambda arguments: measure(QUICK if arguments.quick else FULL),
        benchmark_parser(__doc__),
        minutes=15,
        quick_seconds=60,
        libraries=("torch", "transformers", "peft", "open_clip_torch", "pillow"),
    )


if __name__ == "__main__":
    main()
