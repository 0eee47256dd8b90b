"""Losses of right answers, image by image.

Letters: R rows, T positions, S supervised tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.bootstrap import Measure, ratio_of
from eval.scoring.conditions import Asked, View, views
from train.data.examples import Example
from train.data.packing import PADDING, PackedBatch
from train.data.prompts import tokenize
from train.loop.step import build_step
from train.model.captioner import CaptionModel
from workspace.errors import StageError

PASS_TOKENS = 4096
"""Positions of one forward pass, padding included."""

ROW_TOKENS = 1024
"""Positions of a row, in which images are packed."""

STEP_IMAGES = 256
"""Images whose features are in memory at a time."""


@dataclass(frozen=True)
class Losses:
    """Cross entropy of each image's answers, summed, and the number of their tokens."""

    image_ids: list[int]
    sums: list[float]
    num_tokens: list[int]

    @property
    def measure(self) -> Measure:
        """The mean of a token."""
        return ratio_of(self.sums, self.num_tokens)


def answer_losses(
    asked: Asked, examples: Sequence[Example], max_text_tokens: int
) -> dict[str, Losses]:
    """Return the losses of the right answers, in each way of asking.

    Args:
        asked: The model.
        examples: Images with their conversations.
        max_text_tokens: Longest conversation; the turns behind it are left out.

    Raises:
        StageError: No other image, no answer within `max_text_tokens`, or a loss that is no number.
    """
    kept = [e for e in examples if _num_target_tokens(e, asked, max_text_tokens)]
    if not kept:
        raise StageError(
            f"evaluate.max_text_tokens: {max_text_tokens} cuts off every answer of "
            f"{len(examples)} images. Raise it."
        )
    losses = {}
    for view in views(asked, [example.image_id for example in kept]):
        losses[view.name] = _losses(asked, view, kept, max_text_tokens)
        if not math.isfinite(losses[view.name].measure.value):
            raise StageError(
                f"{asked.name}: the loss of the answers ({view.name}) is not finite. Weights or "
                f"features are damaged: run the {asked.name} stage again."
            )
    return losses


def _losses(asked: Asked, view: View, examples: Sequence[Example], max_text_tokens: int) -> Losses:
    # Shown features go with the texts of another image.
    shown = [Example(i, e.texts) for i, e in zip(view.image_ids, examples, strict=True)]
    of_image: dict[int, tuple[float, int]] = {}
    for start in range(0, len(shown), STEP_IMAGES):
        step = build_step(
            shown[start : start + STEP_IMAGES],
            asked.tokenizer,
            view.features,
            pass_tokens=PASS_TOKENS,
            row_tokens=ROW_TOKENS,
            max_text_tokens=max_text_tokens,
            device=view.model.device,
        )
        for batch in step.batches:
            of_image |= _losses_by_image(view.model, batch.to(view.model.device))
    sums, counts = zip(*(of_image[i] for i in view.image_ids), strict=True)
    return Losses([example.image_id for example in examples], list(sums), list(counts))


def _num_target_tokens(example: Example, asked: Asked, max_text_tokens: int) -> int:
    texts = tokenize(example.texts, asked.tokenizer, max_text_tokens)
    return sum(text.num_target_tokens for text in texts)


@torch.inference_mode()
def _losses_by_image(model: CaptionModel, batch: PackedBatch) -> dict[int, tuple[float, int]]:
    """Return the summed loss of each image of a forward pass, and its number of tokens."""
    model.eval()
    images_S = _images_of_targets(batch)
    losses_S = model.token_losses(batch).double()
    sums = losses_S.new_zeros(len(batch.image_ids)).index_add_(0, images_S, losses_S)
    counts = torch.bincount(images_S, minlength=len(batch.image_ids))
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return dict(zip(batch.image_ids.tolist(), pairs, strict=True))


def _images_of_targets(batch: PackedBatch) -> Tensor:
    """Return which of the batch's images each supervised token belongs to: int64 [S]."""
    num_images_R = batch.image_numbers.amax(1) + 1
    before_R = num_images_R.cumsum(0) - num_images_R
    images_RT = torch.where(
        batch.image_numbers == PADDING, 0, batch.image_numbers + before_R[:, None]
    )
    return images_RT.flatten()[batch.target_slots]
