"""`micro_batch_tokens: auto`: how many positions of a forward pass fit the memory.

On a GPU, forward and backward passes of growing size are tried, of the run's own texts and with its
LoRA. On a CPU the number is fixed, so that a run can be repeated bit by bit.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from accelerate import PartialState
from torch import Tensor

from train.data.examples import Example
from train.data.packing import image_length
from train.data.prompts import tokenize
from train.loop.setup import TrainingSetup
from train.loop.step import StepData
from train.ranks import gather_of_ranks
from workspace.errors import StageError

SIZES = tuple(512 * 2**octave * quarter // 4 for octave in range(6) for quarter in (4, 5, 6, 7))
SIZES += (32_768,)
"""Positions that are tried: four sizes an octave. More than the last one makes no step faster."""

FREE_SHARE = 0.15
"""Share of the memory that stays free: passes of one size differ in their number of supervised
tokens, and the allocator cannot use every gap."""

STEP_MARGIN = 1.25
"""Steps hold different numbers of positions; the first one stands for all, with this margin."""

OPTIMIZER_COPIES = 2
"""AdamW's moments, each of the size of the trainable parameters."""


class Memory(Protocol):
    """The memory that passes take, or a stand-in."""

    def available(self) -> int:
        """Return the bytes that this process can have."""

    def peak(self, tokens: int) -> float:
        """Make a pass of so many positions; return the bytes that training with it takes.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """

    def release(self) -> None:
        """Free what the last pass left."""


def largest_fitting(memory: Memory, sizes: Sequence[int]) -> int:
    """Return the largest of some ascending sizes that leaves FREE_SHARE of the memory, or 0."""
    usable = memory.available() * (1 - FREE_SHARE)

    def fits(tokens: int) -> bool:
        try:
            peak = memory.peak(tokens)
        except torch.OutOfMemoryError:
            peak = math.inf
        # Only here: the exception's traceback held the tensors of the pass.
        memory.release()
        return peak <= usable

    fitting, too_large = -1, len(sizes)
    # Whole octaves first: far too large a pass is never tried.
    for number in sorted({*range(0, len(sizes), 4), len(sizes) - 1}):
        if not fits(sizes[number]):
            too_large = number
            break
        fitting = number
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        fitting, too_large = (middle, too_large) if fits(sizes[middle]) else (fitting, middle)
    return sizes[fitting] if fitting >= 0 else 0


def with_pass_size(
    setup: TrainingSetup, stage: str, stored: int | None, memory: Memory | None = None
) -> TrainingSetup:
    """Replace `auto` in the settings by a number, and say which one and why.

    Args:
        setup: Of the run.
        stage: Its name, for the message.
        stored: The number with which an interrupted run began.
        memory: The GPU's, unless the model is on a CPU.

    Returns:
        The setup, with the same number in all processes.

    Raises:
        StageError: Not even the smallest pass fits.
    """
    if setup.settings.micro_batch_tokens != "auto":
        return setup
    if memory is None and setup.model.device.type == "cuda":
        memory = GpuMemory(setup)
    if stored is not None:
        tokens, reason = stored, "as before the interruption"
    elif memory is None:
        tokens, reason = setup.pass_tokens, "fixed on a CPU, so that a run can be repeated"
    else:
        tokens, reason = _search(setup, memory)
    if PartialState().is_main_process:
        print(f"{stage}: micro_batch_tokens is {tokens}: {reason}", file=sys.stderr)
    return _with_tokens(setup, tokens)


def _search(setup: TrainingSetup, memory: Memory) -> tuple[int, str]:
    held = _positions_of_a_step(setup)
    enough = next((n for n, size in enumerate(SIZES) if size >= held * STEP_MARGIN), len(SIZES) - 1)
    sizes = SIZES[: enough + 1]
    own = largest_fitting(memory, sizes)
    all_tokens: Tensor = gather_of_ranks(torch.tensor([own], device=setup.model.device))
    tokens = int(all_tokens.min())
    room = f"{memory.available() / 2**30:.1f} GiB"
    if not tokens:
        section = setup.settings.section
        raise StageError(
            f"{section}.micro_batch_tokens: a pass of {sizes[0]} positions does not leave "
            f"{FREE_SHARE:.0%} of {room} free. Set {section}.gradient_checkpointing: true or "
            f"llm.quantize: nf4, or give the number of positions to try it all the same."
        )
    if tokens < own:
        return tokens, "the most that fits every GPU"
    if tokens < sizes[-1]:
        return tokens, f"larger passes would not leave {FREE_SHARE:.0%} of {room} free"
    return tokens, "enough for a whole step" if tokens >= held else "the most that is tried"


def _positions_of_a_step(setup: TrainingSetup) -> int:
    """Return how many positions of the first step fall to a process."""
    lengths = _lengths(setup, setup.examples_of(setup.plan()[0]))
    share: int = -(-sum(lengths) // PartialState().num_processes)
    return share


def _lengths(setup: TrainingSetup, examples: Sequence[Example]) -> list[int]:
    patches, longest = setup.image_tokens, setup.settings.max_text_tokens
    lead = len(setup.prompt_format.lead)
    return [
        image_length(tokenize(example.texts, setup.prompt_format, longest), patches, lead)
        for example in examples
    ]


def _with_tokens(setup: TrainingSetup, tokens: int) -> TrainingSetup:
    return replace(setup, settings=replace(setup.settings, micro_batch_tokens=tokens))


def pass_of(setup: TrainingSetup, tokens: int) -> StepData:
    """Return data of the run's first images, repeated if need be, that fill a pass a process.

    Args:
        setup: Of the run.
        tokens: Positions of the pass; every process gets an image in any case.
    """
    num_processes = PartialState().num_processes
    chosen: list[Example] = []
    total = longest = 0
    for step in itertools.cycle(setup.plan()):
        examples = setup.examples_of(step)
        for example, length in zip(examples, _lengths(setup, examples), strict=True):
            total, longest = total + length, max(longest, length)
            # Processes share images evenly, but for one image.
            is_full = total + (num_processes - 1) * longest > num_processes * tokens
            if is_full and len(chosen) >= num_processes:
                return _with_tokens(setup, tokens).step_data(chosen)
            chosen.append(example)
    raise AssertionError("a plan has a step, and a step an image")


@dataclass
class GpuMemory:
    """The memory of the model's GPU."""

    setup: TrainingSetup

    def available(self) -> int:
        """Return what is free or this process's own, within the process's share of the GPU."""
        device = self.setup.model.device
        free, total = torch.cuda.mem_get_info(device)
        share = torch.cuda.get_per_process_memory_fraction(device)
        return min(free + torch.cuda.memory_reserved(device), int(share * total))

    def peak(self, tokens: int) -> float:
        """Make a forward and a backward pass; count gradients and the optimizer's state too."""
        model = self.setup.model
        parameters = list(model.trainable_parameters().values())
        batch = max(pass_of(self.setup, tokens).batches, key=lambda batch: batch.token_ids.numel())
        torch.cuda.reset_peak_memory_stats(model.device)
        for parameter in parameters:
            # The passes of a step add to one gradient.
            parameter.grad = torch.zeros_like(parameter)
        before = torch.cuda.memory_allocated(model.device)
        model.train()
        model(batch.to(model.device)).backward()
        # Whole images fill a pass almost.
        missing = max(1.0, tokens / batch.token_ids.numel())
        taken = (torch.cuda.max_memory_allocated(model.device) - before) * missing
        return before + taken + OPTIMIZER_COPIES * sum(p.nbytes for p in parameters)

    def release(self) -> None:
        """Free gradients and the allocator's unused blocks; the peak of the pass is forgotten."""
        self.setup.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.setup.model.device)
