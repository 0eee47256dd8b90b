"""One optimizer step: its data, prepared ahead in another thread, and its computation.

The loss is the sum over the supervised tokens of the whole step divided by their number, so it does
not depend on how the step is cut into forward passes or spread over processes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from train.data.examples import Example
from train.data.packing import (
    PackedBatch,
    Pass,
    collate,
    image_length,
    num_slots,
    pack,
    pack_one_row_passes,
)
from train.data.prefetch import Features
from train.data.prompts import PromptFormat, tokenize
from train.model.captioner import CaptionModel
from train.ranks import sum_of_ranks
from workspace.errors import StageError

SMALL_SCALE = 64
"""Factor of the loss in a second try of a step in float16, after a gradient that overflowed."""


@dataclass(frozen=True)
class StepData:
    """The data of one optimizer step. All counts are over all processes."""

    batches: list[PackedBatch]
    """The forward passes of this process."""
    image_ids: list[int]
    num_target_tokens: int
    """Supervised tokens."""
    num_positions: int
    """Positions without padding."""
    num_slots: int
    """Positions with padding."""
    num_cut: int
    """Texts that were too long and lost turns, or the end of their first turn."""


def build_step(
    examples: Sequence[Example],
    prompt_format: PromptFormat,
    store: Features,
    *,
    pass_tokens: int,
    row_tokens: int | None,
    max_text_tokens: int,
    device: torch.device,
    pool: int = 1,
) -> StepData:
    """Tokenise and pack the texts of some images, and gather the images' features.

    Every process packs the same passes and gathers the features of its own share.

    Args:
        examples: At least one.
        prompt_format: Of the language model.
        store: Holds the features.
        pass_tokens: Most positions of a forward pass, padding included.
        row_tokens: Most positions of a row of packed images; None: a forward pass is one row, of
            one of few lengths (`padded_length`).
        max_text_tokens: Most tokens of a text.
        device: The model's; for a GPU, the tensors of a pass share one block of pinned memory.
        pool: The projector's.

    Raises:
        StageError: No answer begins within `max_text_tokens`, so there is nothing to learn.
    """
    texts_in_order = [text for example in examples for text in example.texts]
    all_texts = tokenize(texts_in_order, prompt_format, max_text_tokens)
    num_target_tokens = sum(text.num_target_tokens for text in all_texts)
    if not num_target_tokens:
        raise StageError(
            f"image {examples[0].image_id} and {len(examples) - 1} others: max_text_tokens is "
            f"{max_text_tokens}, which cuts off every answer of the step. Raise it."
        )
    remaining = iter(all_texts)
    texts = [[next(remaining) for _ in example.texts] for example in examples]
    image_ids = [example.image_id for example in examples]
    lead, patches = prompt_format.lead, store.spec.patches // pool**2
    lengths = [image_length(image_texts, patches, len(lead)) for image_texts in texts]
    processes = PartialState()
    passes = _pack_for(processes.num_processes, lengths, pass_tokens, row_tokens)

    def batch(number: int) -> PackedBatch:
        ids = np.array([image_ids[image] for row in passes[number].rows for image in row])
        patches_NPD = torch.from_numpy(store.gather(ids))
        collated = collate(passes[number], image_ids, texts, patches_NPD, number, lead, pool=pool)
        return collated.in_one_block(pin_memory=True) if device.type == "cuda" else collated

    own_passes = range(processes.process_index, len(passes), processes.num_processes)
    return StepData(
        batches=[batch(number) for number in own_passes],
        image_ids=image_ids,
        num_target_tokens=num_target_tokens,
        num_positions=sum(lengths),
        num_slots=num_slots(passes),
        num_cut=sum(text.was_cut for text in all_texts),
    )


def _pack_for(
    num_processes: int, lengths: Sequence[int], pass_tokens: int, row_tokens: int | None
) -> list[Pass]:
    """Pack images of some lengths into at least one pass per process, so that no rank idles."""
    if row_tokens is None:
        return pack_one_row_passes(lengths, pass_tokens=pass_tokens, num_processes=num_processes)
    if num_processes > 1:
        share = -(-sum(lengths) // num_processes)
        row_tokens, pass_tokens = min(row_tokens, share), min(pass_tokens, share)
    return pack(lengths, row_tokens=row_tokens, pass_tokens=pass_tokens)


def optimizer_step(
    model: CaptionModel,
    optimizer: torch.optim.Optimizer,
    data: StepData,
    *,
    clip_norm: float,
    seed: tuple[int, int],
) -> float:
    """Make one optimizer step over all forward passes of all processes.

    Args:
        model: Put into `train()` here.
        optimizer: Of the trainable parameters.
        data: Of the step.
        clip_norm: Gradients are scaled down so that their norm, all together, is at most this.
        seed: The run's seed and the step's number. With the number of a pass they decide LoRA's
            dropout, so a resumed run needs no state of a random generator.

    Returns:
        Cross entropy summed over the supervised tokens.

    Raises:
        FloatingPointError: The loss or the gradient's norm is not finite; the weights are as
            before.
    """
    model.train()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scales: tuple[int, ...] = (1,)
    if model.language_model.dtype == torch.float16:
        # Gradients of a mean over many tokens underflow in float16, those of a sum may overflow.
        scales = (data.num_target_tokens, SMALL_SCALE)
    total = norm = math.nan
    for scale in scales:
        optimizer.zero_grad(set_to_none=True)
        loss_sum = _add_gradients(model, data, seed, scale)
        _sum_gradients(parameters)
        if scale != 1:
            for gradient in (p.grad for p in parameters if p.grad is not None):
                gradient /= scale
        norm_tensor = nn.utils.clip_grad_norm_(parameters, clip_norm)
        # One transfer: the host waits for a GPU here, and nowhere else in the step.
        numbers = torch.stack([sum_of_ranks(loss_sum), norm_tensor.double()])
        total, norm = map(float, numbers.tolist())
        if math.isfinite(norm):
            break
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise FloatingPointError(f"the loss is {total}, its gradient's norm {norm}")
    optimizer.step()
    return total


def _add_gradients(
    model: CaptionModel, data: StepData, seed: tuple[int, int], scale: int
) -> torch.Tensor:
    """Add the gradients of `scale` times the mean loss; return the summed loss: [], float64."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in data.batches:
        torch.manual_seed(pass_seed(*seed, batch.number))
        loss = model(batch.to(model.device))
        (loss / data.num_target_tokens * scale).backward()
        loss_sum += loss.detach()
    return loss_sum


def pass_seed(seed: int, step: int, number: int) -> int:
    """Return the seed of one forward pass, from 0 to 2**63 - 1."""
    return int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> 1)


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over all processes."""
    if PartialState().num_processes == 1:
        return
    for parameter in parameters:
        # A process without a pass has no gradient.
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = sum_of_ranks(gradient)


@torch.inference_mode()
def mean_loss(model: CaptionModel, data: StepData) -> float:
    """Return the mean loss of a supervised token, over all processes."""
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch in data.batches:
        total += model(batch.to(model.device))
    return float(sum_of_ranks(total)) / data.num_target_tokens
