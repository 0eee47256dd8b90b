"""How fast both stages train: our loop, the usual loop and packing loops with the same weights.

Every step learns from other images, as in a run, so its passes have other lengths. All loops get
their data from the same thread ahead of use. The learning rate is 0: weights stay as they are.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bench import usual_loop
from bench.gpu_parts import packed_loop
from bench.gpu_parts.arithmetic import Work, count_work, step_flops
from bench.gpu_parts.models import make_caption_model, with_shared_weights
from bench.gpu_parts.report import Row
from bench.step import FINETUNE, PRETRAIN, Stage, as_published
from bench.step import Contender as StepContender
from bench.step import difference as gradient_difference
from bench.texts import bare_format, draw_captions, draw_conversations
from bench.usual_loop import cached, make_samples, shuffled
from cache import FeatureStore
from train.data.examples import Example
from train.data.prefetch import Prefetcher
from train.data.prompts import tokenize
from train.loop.step import StepData, build_step, optimizer_step
from train.model.attention import NAME as OUR_ATTENTION
from train.model.captioner import use_fused_gelu
from train.model.language_model import lora_dropouts
from train.settings import LoraSettings

SDPA_ROW_TOKENS = 256
"""Positions of a row where FlexAttention does not work."""

NO_LIMIT = 1 << 30
"""Most tokens of a text: none of a benchmark is too long."""

DIFFERENCE_IMAGES = 4
"""Images whose gradients are compared."""


@dataclass(frozen=True)
class Steps:
    """How many steps of a row are made."""

    warmup: int
    """The first ones compile and choose kernels."""
    timed: int


@dataclass(frozen=True)
class Chip:
    """Rates of bf16 matrix products that shares are taken of, in FLOP/s."""

    measured: float
    data_sheet: float | None


@dataclass(frozen=True)
class Loop:
    """A way of making optimizer steps."""

    start: Callable[[], object]
    """Sets the model up for this loop."""
    prepare: Callable[[list[Example]], Any]
    """Makes the data of a step, ahead and in another thread."""
    step: Callable[[Any], float]
    """Makes a step of prepared data; returns the mean loss of a supervised token."""
    shares_patches: bool
    """Whether the texts of an image stand behind one copy of its patches."""


def make_stage(
    name: str,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    lora: LoraSettings,
    num_examples: int,
) -> Stage:
    """Make a stage around a language model whose weights it shares.

    Args:
        name: PRETRAIN or FINETUNE.
        base: The language model; not changed.
        tokenizer: Of as many tokens.
        store: Features; examples share its images in turn.
        lora: Of FINETUNE.
        num_examples: Images with texts that are drawn.
    """
    model = make_caption_model(
        with_shared_weights(base),
        vision_width=store.spec.width,
        lora=lora if name == FINETUNE else None,
    )
    draw = draw_captions if name == PRETRAIN else draw_conversations
    examples = [
        Example(example.image_id % len(store), example.texts)
        for example in draw(np.random.default_rng(0), num_examples)
    ]
    learning = list(model.trainable_parameters().values())
    optimizer = torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0, fused=True)
    return Stage(name, model, tokenizer, store, examples, optimizer)


def our_loop(stage: Stage, pass_tokens: int) -> Loop:
    """Return the training loop's own step."""
    model, numbers = stage.model, iter(range(1, NO_LIMIT))

    def start() -> None:
        model.language_model.set_attn_implementation(OUR_ATTENTION)
        use_fused_gelu(model.language_model)

    def step(data: StepData) -> float:
        loss_sum = optimizer_step(
            model, stage.optimizer, data, clip_norm=math.inf, seed=(0, next(numbers))
        )
        return loss_sum / data.num_target_tokens

    return Loop(start, partial(_packed, stage, pass_tokens), step, shares_patches=True)


def _packed(stage: Stage, pass_tokens: int, examples: Sequence[Example]) -> StepData:
    return build_step(
        examples,
        bare_format(stage.tokenizer),
        stage.store,
        pass_tokens=pass_tokens,
        row_tokens=None if stage.model.packs_one_row else SDPA_ROW_TOKENS,
        max_text_tokens=NO_LIMIT,
        device=stage.model.device,
    )


def usual_loop_of(stage: Stage, batch_size: int) -> Loop:
    """Return the padded loop of `bench.usual_loop`."""
    model = stage.model
    features = cached(stage.store)

    def start() -> None:
        model.train()
        as_published(model.language_model)

    def step(samples: list[usual_loop.Sample]) -> float:
        return usual_loop.optimizer_step(
            model.projector, model.language_model, samples, features, stage.optimizer, batch_size
        )

    return Loop(
        start,
        lambda examples: shuffled(make_samples(examples, stage.tokenizer)),
        step,
        shares_patches=False,
    )


def packed_loop_of(stage: Stage, pass_tokens: int, head: str) -> Loop:
    """Return the packing loop of `bench.gpu_parts.packed_loop` with one of its heads."""

    def start() -> None:
        stage.model.train()
        packed_loop.use_document_attention(stage.model)
        use_fused_gelu(stage.model.language_model)

    def prepare(examples: list[Example]) -> tuple[StepData, list[packed_loop.Documents]]:
        single = [Example(e.image_id, (text,)) for e in examples for text in e.texts]
        data = _packed(stage, pass_tokens, single)
        return data, [packed_loop.find_documents(batch) for batch in data.batches]

    def step(prepared: tuple[StepData, list[packed_loop.Documents]]) -> float:
        return packed_loop.optimizer_step(
            stage.model, stage.optimizer, *prepared, packed_loop.HEADS[head]
        )

    return Loop(start, prepare, step, shares_patches=False)


def examples_of_steps(stage: Stage, images: int) -> Iterator[list[Example]]:
    """Yield the examples of one step after the other, without end; they repeat when all were used.

    Args:
        stage: Whose examples.
        images: Of a step.
    """
    number = 0
    while True:
        places = range(number * images, (number + 1) * images)
        yield [stage.examples[place % len(stage.examples)] for place in places]
        number += 1


def images_of_passes(stage: Stage, num_passes: int, pass_tokens: int) -> int:
    """Return how many images nearly fill so many of our forward passes."""
    work = work_of(stage, stage.examples, shares_patches=True)
    # Row lengths are rounded up by a few per cent.
    return max(1, int(0.9 * num_passes * pass_tokens * len(stage.examples) / work.positions))


def work_of(stage: Stage, examples: Sequence[Example], *, shares_patches: bool) -> Work:
    """Count the work of a loop's sequences."""
    bare = bare_format(stage.tokenizer)
    images = [tokenize(list(e.texts), bare, NO_LIMIT) for e in examples]
    if not shares_patches:
        images = [[text] for texts in images for text in texts]
    return count_work(images, stage.store.spec.patches)


def estimate_seconds(
    stage: Stage, loop: Loop, images: int, steps: Steps, rank: int, chip: Chip
) -> float:
    """Return about how long a row takes: a fifth of the chip's rate, and a start of 4 seconds."""
    some = stage.examples[:images]
    scale = images / len(some)
    work = work_of(stage, some, shares_patches=loop.shares_patches)
    flops = scale * step_flops(
        work, stage.model.language_model.config, stage.store.spec.width, rank
    )
    # One more step counts the host's waits.
    return 4 + (steps.warmup + steps.timed + 1) * flops / (0.2 * chip.measured)


def measure_loop(stage: Stage, loop: Loop, images: int, steps: Steps, rank: int, chip: Chip) -> Row:
    """Make some steps and return what they took.

    Args:
        stage: Model, texts and features.
        loop: Makes the steps.
        images: Of a step.
        steps: How many.
        rank: LoRA's; 0 in stage 1.
        chip: Rates that shares are taken of.
    """
    model = stage.model
    loop.start()
    needed = list(islice(examples_of_steps(stage, images), steps.warmup + steps.timed + 1))
    source = Prefetcher(loop.prepare, needed)
    seconds: list[float] = []
    padding: list[float] = []
    waited = waited_at_end = before = loss = 0.0
    compiled, waits = 0, None
    with peak_gpu_memory(model) as memory:
        for number, data in enumerate(source):
            if number == steps.warmup + steps.timed:
                waits = host_waits(partial(loop.step, data), model.device)
                break
            if number == steps.warmup:
                # The wait for this step's data is the first that counts.
                compiled, waited = num_compilations(), source.waited - source.last_wait
                before = time.perf_counter() - source.last_wait
            loss = loop.step(data)
            if number >= steps.warmup:
                now = time.perf_counter()
                seconds.append(now - before)
                padding.append(padding_share(data))
                before = now
                waited_at_end = source.waited
    done = [e for part in needed[steps.warmup : steps.warmup + steps.timed] for e in part]
    work = work_of(stage, done, shares_patches=loop.shares_patches)
    flops = step_flops(work, model.language_model.config, stage.store.spec.width, rank)
    total = sum(seconds)
    row = {
        "texts_per_second": round(work.texts / total, 1),
        "supervised_tokens_per_second": round(work.targets / total),
        "positions_per_second": round(work.positions / total),
        "texts_per_step": round(work.texts / steps.timed),
        "share_of_bf16": round(flops / total / (chip.data_sheet or chip.measured), 4),
        "share_of_measured_bf16": round(flops / total / chip.measured, 4),
        "padding_share": round(statistics.mean(padding), 3),
        "wait_share": round((waited_at_end - waited) / total, 4),
        "compilations": num_compilations() - compiled,
        "host_waits": waits,
        "seconds": [round(value, 4) for value in seconds],
        "loss": loss,
    }
    return row | memory


def padding_share(data: Any) -> float:
    """Return the share of padding in packed data; 0 for a loop that pads on its own."""
    packed = data[0] if isinstance(data, tuple) else data
    if not isinstance(packed, StepData):
        return 0.0
    return 1 - packed.num_positions / packed.num_slots


@contextmanager
def peak_gpu_memory(model: nn.Module) -> Iterator[dict[str, float]]:
    """Take the most memory of the block: this model's weights, and all that is made meanwhile.

    Yields:
        Empty, and filled at the end: `peak_gib` and `weights_gib`; nothing on a CPU.
    """
    memory: dict[str, float] = {}
    if next(model.parameters()).device.type != "cuda":
        yield memory
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield memory
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peak = torch.cuda.max_memory_allocated() - before + weights
    memory |= {"peak_gib": round(peak / 2**30, 2), "weights_gib": round(weights / 2**30, 2)}


def num_compilations() -> int:
    """Return how many graphs torch.compile has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


def host_waits(work: Callable[[], object], device: torch.device) -> int | None:
    """Do some work and count the operations in which the host waits for the GPU; None on a CPU."""
    if device.type != "cuda":
        work()
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in caught)


def difference(stage: Stage, found: Loop, wanted: Loop) -> float:
    """Return the relative difference of the gradients of two loops, in the L2 norm.

    LoRA's dropout is off meanwhile: every loop would drop other inputs.
    """
    contenders = [_contender(loop, stage.examples[:DIFFERENCE_IMAGES]) for loop in (found, wanted)]
    modules = [m for dropout in lora_dropouts(stage.model) for m in dropout.modules()]
    dropouts = [module for module in modules if isinstance(module, nn.Dropout)]
    shares = [dropout.p for dropout in dropouts]
    try:
        for dropout in dropouts:
            dropout.p = 0.0
        return gradient_difference(stage, *contenders)
    finally:
        for dropout, share in zip(dropouts, shares, strict=True):
            dropout.p = share


def _contender(loop: Loop, examples: list[Example]) -> StepContender:
    def step() -> float:
        loop.start()
        return loop.step(loop.prepare(examples))

    # Its sizes are not used.
    return StepContender(step, 0, 0)
