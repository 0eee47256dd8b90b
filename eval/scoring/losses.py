"""Losses of the right answers, image by image, under all conditions.

Letters: R rows, T positions, S supervised tokens.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.bootstrap import Measure, ratio_of
from eval.scoring.budget import UNLIMITED, Budget
from eval.scoring.conditions import Condition, make_conditions
from eval.scoring.evaluated_models import EvaluatedModel
from train.data.examples import Example
from train.data.packing import PADDING, PackedBatch
from train.data.prompts import tokenize
from train.loop.step import build_step
from train.model.captioner import CaptionModel
from train.model.preflight import check_positions
from train.model.supported import most_positions
from workspace.errors import StageError

PASS_TOKENS = 4096
"""Positions of one forward pass, padding included."""

ROW_TOKENS = 1024
"""Positions of one packed row."""

BUDGET_IMAGES = 32
"""Images between two looks at the clock, with a budget."""

STEP_IMAGES = 256
"""Images whose features are in memory at a time."""


@dataclass(frozen=True)
class Losses:
    """Each image's summed cross entropy over its answers' tokens, and their number."""

    image_ids: list[int]
    sums: list[float]
    num_tokens: list[int]

    def __add__(self, other: "Losses") -> "Losses":
        """Return the losses of the images of both."""
        return Losses(
            self.image_ids + other.image_ids,
            self.sums + other.sums,
            self.num_tokens + other.num_tokens,
        )

    def only(self, images: Collection[int]) -> "Losses":
        """Return the losses of some images."""
        kept = [number for number, image_id in enumerate(self.image_ids) if image_id in images]
        return Losses(
            [self.image_ids[number] for number in kept],
            [self.sums[number] for number in kept],
            [self.num_tokens[number] for number in kept],
        )

    @property
    def measure(self) -> Measure:
        """The mean over tokens, in nats."""
        return ratio_of(self.sums, self.num_tokens)


def answer_losses(
    model: EvaluatedModel,
    examples: Sequence[Example],
    max_text_tokens: int,
    budget: Budget = UNLIMITED,
) -> dict[str, Losses]:
    """Return the losses of the right answers under each condition; nothing without examples.

    Args:
        model: The model.
        examples: Images with their conversations.
        max_text_tokens: Longest conversation; the turns beyond it are left out.
        budget: Limits the images.

    Raises:
        SettingsError: Conversations may be longer than the language model permits.
        StageError: The store has no other image, `max_text_tokens` cuts off every answer, or a loss
            is not finite.
    """
    if not examples:
        return {}
    language_model = model.model.language_model
    image_tokens = model.model.projector.num_embeddings(model.store.spec.patches)
    given = len(model.prompt_format.lead) + image_tokens
    limit = most_positions(language_model)
    check_positions(language_model.name_or_path, limit, given, max_text_tokens)
    fitting = [e for e in examples if _num_target_tokens(e, model, max_text_tokens)]
    if not fitting:
        raise StageError(
            f"evaluate.max_text_tokens: {max_text_tokens} cuts off every answer of "
            f"{len(examples)} images. Raise it."
        )
    image_ids = [example.image_id for example in fitting]
    losses: dict[str, Losses] = {}
    conditions = make_conditions(model, image_ids)
    for part in budget.parts(image_ids, BUDGET_IMAGES):
        numbers = [number for number, image_id in enumerate(image_ids) if image_id in part]
        for condition in conditions:
            of_part = _losses(
                model, condition.only(numbers), [fitting[n] for n in numbers], max_text_tokens
            )
            if not math.isfinite(of_part.measure.value):
                raise StageError(
                    f"{model.name}: the loss of the answers ({condition.name}) is not finite. "
                    f"Weights or features are damaged: run the {model.name} stage again."
                )
            losses[condition.name] = losses.get(condition.name, Losses([], [], [])) + of_part
    return losses


def _losses(
    model: EvaluatedModel, condition: Condition, examples: Sequence[Example], max_text_tokens: int
) -> Losses:
    # Each image's texts stand behind the features that the condition shows for it.
    shown = [Example(i, e.texts) for i, e in zip(condition.image_ids, examples, strict=True)]
    by_image: dict[int, tuple[float, int]] = {}
    for start in range(0, len(shown), STEP_IMAGES):
        step = build_step(
            shown[start : start + STEP_IMAGES],
            model.prompt_format,
            condition.features,
            pass_tokens=PASS_TOKENS,
            row_tokens=ROW_TOKENS,
            max_text_tokens=max_text_tokens,
            device=condition.model.device,
            pool=condition.model.projector.pool,
        )
        for batch in step.batches:
            by_image |= _losses_by_image(condition.model, batch.to(condition.model.device))
    sums, counts = zip(*(by_image[i] for i in condition.image_ids), strict=True)
    return Losses([example.image_id for example in examples], list(sums), list(counts))


def _num_target_tokens(example: Example, model: EvaluatedModel, max_text_tokens: int) -> int:
    texts = tokenize(example.texts, model.prompt_format, max_text_tokens)
    return sum(text.num_target_tokens for text in texts)


@torch.inference_mode()
def _losses_by_image(model: CaptionModel, batch: PackedBatch) -> dict[int, tuple[float, int]]:
    """Return each image's summed loss and number of tokens."""
    model.eval()
    images_S = _images_of_targets(batch)
    losses_S = model.token_losses(batch).double()
    sums = losses_S.new_zeros(len(batch.image_ids)).index_add_(0, images_S, losses_S)
    counts = torch.bincount(images_S, minlength=len(batch.image_ids))
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return dict(zip(batch.image_ids.tolist(), pairs, strict=True))


def _images_of_targets(batch: PackedBatch) -> Tensor:
    """Return the image of each supervised token, as an index of the batch's images: int64 [S]."""
    num_images_R = batch.image_numbers.amax(1) + 1
    before_R = num_images_R.cumsum(0) - num_images_R
    images_RT = torch.where(
        batch.image_numbers == PADDING, 0, batch.image_numbers + before_R[:, None]
    )
    return images_RT.flatten()[batch.target_slots]
