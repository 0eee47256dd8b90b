"""One optimizer step: its data, prepared in the thread that works ahead, and its computation.

The loss is the sum over the supervised tokens of the whole step divided by their number, so that it
does not depend on how the step is cut into forward passes or over processes.

Letters: N images of a forward pass, P patches, D width of the vision tower.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from train.data.examples import Example
from train.data.packing import ImageTexts, PackedBatch, collate, pack
from train.data.prefetch import Features, gather_tensor
from train.data.prompts import tokenize
from train.model.captioner import CaptionModel
from workspace.errors import StageError


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass of this process works on."""

    number: int
    """Of the step's passes, those of other processes included."""
    patches_NPD: Tensor
    """float16."""
    batch: PackedBatch


@dataclass(frozen=True)
class StepData:
    """What one optimizer step learns from. All counts are of all processes together."""

    passes: list[ForwardPass]
    """Those of this process."""
    image_ids: list[int]
    num_learned: int
    """Supervised tokens."""
    num_positions: int
    """Positions that are read, padding not counted."""
    num_slots: int
    """Positions that are computed, padding counted."""
    num_cut: int
    """Texts of which turns, or the end of the first one, were left out for their length."""


def build_step(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    store: Features,
    *,
    pass_tokens: int,
    row_tokens: int,
    max_text_tokens: int,
    device: torch.device,
) -> StepData:
    """Prepare some images and all their texts.

    Of several processes each builds the same passes and gathers the features of its own.

    Args:
        examples: At least one.
        tokenizer: Of the language model.
        store: Holds the features.
        pass_tokens: Most positions of one forward pass, padding included.
        row_tokens: Most positions of a row, in which images are packed.
        max_text_tokens: Longest text behind an image.
        device: Where the model is; for a GPU, features are gathered into pinned memory.

    Raises:
        StageError: No answer begins within `max_text_tokens`, so there is nothing to learn.
    """
    tokenized = tokenize([text for e in examples for text in e.texts], tokenizer, max_text_tokens)
    num_learned = sum(branch.num_learned for branch in tokenized)
    if not num_learned:
        raise StageError(
            f"image {examples[0].image_id} and {len(examples) - 1} others: max_text_tokens is "
            f"{max_text_tokens}, which cuts off every answer of the step. Raise it."
        )
    branches = iter(tokenized)
    images = [ImageTexts(e.image_id, tuple(next(branches) for _ in e.texts)) for e in examples]
    patches = store.spec.patches
    num_positions = sum(patches + image.num_text_tokens for image in images)
    processes = PartialState()
    if processes.num_processes > 1:
        # As many passes as processes at least: none is to wait for another without need.
        share = -(-num_positions // processes.num_processes)
        row_tokens, pass_tokens = min(row_tokens, share), min(pass_tokens, share)
    planned = pack(images, patches, row_tokens=row_tokens, pass_tokens=pass_tokens)
    batches = [collate(rows, patches) for rows in planned]
    mine = range(processes.process_index, len(batches), processes.num_processes)
    return StepData(
        [
            ForwardPass(n, gather_tensor(store, batches[n].image_ids, device), batches[n])
            for n in mine
        ],
        [image.image_id for image in images],
        num_learned,
        num_positions,
        sum(batch.token_ids.numel() for batch in batches),
        sum(branch.cut for branch in tokenized),
    )


def optimizer_step(
    model: CaptionModel,
    optimizer: torch.optim.Optimizer,
    data: StepData,
    *,
    clip_norm: float,
    seed: tuple[int, int],
) -> float:
    """Make one optimizer step over all its forward passes, and over all processes.

    Args:
        model: Put into `train()` here.
        optimizer: Of the parameters that learn.
        data: What is learned from.
        clip_norm: Gradients of all parameters together are scaled down to this norm.
        seed: Of the run, and the step's number: with the number of a pass, all that LoRA's dropout
            depends on. So a run that is continued needs no state of a random generator.

    Returns:
        Cross entropy summed over the supervised tokens.

    Raises:
        FloatingPointError: It or the gradient's norm is not finite; the weights are as before.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    for one in data.passes:
        torch.manual_seed(pass_seed(*seed, one.number))
        loss = model(one.patches_NPD, one.batch.to(model.device))
        (loss / data.num_learned).backward()
        loss_sum += loss.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _sum_over_processes(parameters)
    total = float(reduce(loss_sum, "sum"))
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm).item()
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(f"the loss is {total}, its gradient's norm {norm}")
    optimizer.step()
    return total


def pass_seed(seed: int, step: int, number: int) -> int:
    """Return the seed of one forward pass."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> 1)


def _sum_over_processes(parameters: Sequence[nn.Parameter]) -> None:
    if PartialState().num_processes == 1:
        return
    for parameter in parameters:
        # A process can have had no pass at all.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = reduce(gradient, "sum")


@torch.inference_mode()
def mean_loss(model: CaptionModel, data: StepData) -> float:
    """Return the mean loss of a supervised token, over all processes."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for one in data.passes:
        total += model(one.patches_NPD, one.batch.to(model.device))
    return float(reduce(total, "sum")) / data.num_learned
