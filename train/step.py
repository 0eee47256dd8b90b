"""The data of one optimizer step: texts tokenised, features gathered, both laid out as tensors.

Letters: R rows of a forward pass, P patches, D width of the vision tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cache import FeatureStore
from cache.errors import StageError
from train.batching import MicroBatch, Row, collate, micro_batches
from train.data import Example
from train.model import CaptionModel
from train.prompts import tokenize
from train.source import gather_tensor


@dataclass(frozen=True)
class StepData:
    """What one optimizer step learns from."""

    parts: list[tuple[Tensor, MicroBatch]]
    """Patches [R, P, D] float16 and the texts behind them, for each forward pass."""
    image_ids: list[int]
    num_learned: int
    """Supervised tokens of all parts."""
    num_positions: int
    """Positions read, padding not counted."""
    num_cut: int
    """Texts of which turns, or the end of the first one, were left out for their length."""


def build_step(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    store: FeatureStore,
    *,
    max_tokens: int,
    max_text_tokens: int,
    device: torch.device,
) -> StepData:
    """Prepare some images and all their texts.

    Args:
        examples: At least one.
        tokenizer: Of the language model.
        store: Holds the features.
        max_tokens: Positions of one forward pass, padding included.
        max_text_tokens: Longest text behind an image.
        device: Where the model is; for a GPU, features are gathered into pinned memory.

    Raises:
        StageError: No answer begins within `max_text_tokens`, so there is nothing to learn.
    """
    texts = [text for example in examples for text in example.texts]
    tokenized = tokenize(texts, tokenizer, max_text_tokens)
    num_learned = sum(branch.num_learned for branch in tokenized)
    if not num_learned:
        raise StageError(
            f"image {examples[0].image_id} and {len(examples) - 1} others: max_text_tokens is "
            f"{max_text_tokens}, which cuts off every answer of the step. Raise it."
        )
    branches = iter(tokenized)
    rows = [Row(e.image_id, tuple(next(branches) for _ in e.texts)) for e in examples]
    patches = store.spec.patches
    parts = []
    for part in micro_batches(rows, patches, max_tokens):
        patches_RPD = gather_tensor(store, np.array([row.image_id for row in part]), device)
        parts.append((patches_RPD, collate(part, patches)))
    return StepData(
        parts,
        [row.image_id for row in rows],
        num_learned,
        sum(patches + row.num_text_tokens for row in rows),
        sum(branch.cut for branch in tokenized),
    )


@torch.inference_mode()
def mean_loss(model: CaptionModel, data: StepData) -> float:
    """Return the mean loss of a supervised token."""
    model.eval()
    total = sum(float(model(x_RPD, batch.to(model.device))) for x_RPD, batch in data.parts)
    return total / data.num_learned
