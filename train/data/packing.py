"""Packs images and their texts into rows, and rows into the tensors of a forward pass.

All texts of an image stand behind one copy of its patches. Each text sees the patches and itself,
at the positions that it would have alone. So loss and gradients equal those of one sequence per
text, for a fraction of the tokens. Several images are packed into a row.

    row             patches   text 1   text 2   patches   text 1   padding
    image_numbers   0 0 0 0   0 0 0    0 0      1 1 1 1   1 1 1    -1 -1
    text_ids        0 0 0 0   1 1 1    2 2      0 0 0 0   1 1 1     0  0
    positions       0 1 2 3   4 5 6    4 5      0 1 2 3   4 5 6     0  0

Letters: R rows, T positions of a row, N images, P patches, D width of the vision tower, S
supervised tokens. A slot is an index into the flattened R x T positions.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.data.prompts import TokenizedText

EXTRA_ROWS = 8
"""Extra row counts to try beyond the minimum: 12 equal images pack tighter as 3 x 4 than as
5 + 4 + 3."""

PADDING = -1
"""Image number of positions that hold nothing."""

Row = list[int]
"""Indices of the images in a row."""

Pass = list[Row]
"""The rows of a forward pass."""


@dataclass(frozen=True)
class PackedBatch:
    """The input of one forward pass."""

    number: int
    """Number of the pass within its optimizer step, counted over all processes."""
    image_ids: NDArray[np.int64]
    """[N], in the order of the patches."""
    patches_NPD: Tensor
    """float16."""
    token_ids: Tensor
    """int64 [R, T]: 0 at patches and padding."""
    positions: Tensor
    """int64 [R, T]: position ids. Patches have 0 to P - 1; every text begins at P."""
    image_numbers: Tensor
    """int64 [R, T]: 0, 1, ... the images of a row, or PADDING."""
    text_ids: Tensor
    """int64 [R, T]: 0 for patches, then 1, 2, ... the texts of an image."""
    patch_slots: Tensor
    """int64 [N x P]: slots of the patches."""
    target_slots: Tensor
    """int64 [S]: the slot that predicts each supervised token. The last patch of an image predicts
    the first tokens of all its texts."""
    target_ids: Tensor
    """int64 [S]: the supervised tokens, text by text."""

    def to(self, device: torch.device) -> "PackedBatch":
        """Return a copy on a device."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def image_length(texts: Sequence[TokenizedText], patches: int) -> int:
    """Return how many positions an image takes.

    These are its patches and the tokens of its texts, without the last token of each text, which
    is only predicted.
    """
    return patches + sum(len(text.token_ids) - 1 for text in texts)


def pack(lengths: Sequence[int], *, row_tokens: int, pass_tokens: int) -> list[Pass]:
    """Pack images into rows, and rows into forward passes, with little padding.

    The loss of a step does not depend on how it is packed.

    Args:
        lengths: Positions of each image; at least one image.
        row_tokens: Most positions of a row; an image that is longer gets a row of its own.
        pass_tokens: Most positions of a forward pass, padding included; a pass has at least one
            row.

    Returns:
        For each pass its rows, for each row the indices of its images.
    """
    fewest = min(math.ceil(sum(lengths) / row_tokens), len(lengths))
    best: list[Pass] = []
    for num_rows in range(fewest, len(lengths) + 1):
        if best and num_rows > fewest + EXTRA_ROWS:
            break
        rows = _fill_rows(lengths, num_rows)
        if any(length > row_tokens and len(row) > 1 for length, row in rows):
            continue
        passes = _split_into_passes(rows, pass_tokens)
        if not best or num_slots(passes, lengths) < num_slots(best, lengths):
            best = passes
    return best


def num_slots(passes: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int]) -> int:
    """Return the positions of packed passes, padding included."""
    return sum(
        len(rows) * max(sum(lengths[image] for image in row) for row in rows) for rows in passes
    )


def _fill_rows(lengths: Sequence[int], num_rows: int) -> list[tuple[int, Row]]:
    """Put the longest remaining image into the shortest row; return lengths and rows."""
    rows: list[Row] = [[] for _ in range(num_rows)]
    shortest = [(0, number) for number in range(num_rows)]
    for image in sorted(range(len(lengths)), key=lambda image: -lengths[image]):
        length, number = shortest[0]
        rows[number].append(image)
        heapq.heapreplace(shortest, (length + lengths[image], number))
    return [(length, rows[number]) for length, number in shortest]


def _split_into_passes(rows: list[tuple[int, Row]], pass_tokens: int) -> list[Pass]:
    """Put rows of similar length into the same pass."""
    passes: list[Pass] = []
    row_length = 0
    # The longest row first: it decides the width of its pass.
    for length, row in sorted(rows, key=lambda row: -row[0]):
        if not passes or (len(passes[-1]) + 1) * row_length > pass_tokens:
            passes.append([])
            row_length = length
        passes[-1].append(row)
    return passes


def collate(
    rows: Sequence[Sequence[int]],
    image_ids: Sequence[int],
    texts: Sequence[Sequence[TokenizedText]],
    patches_NPD: Tensor,
    number: int = 0,
) -> PackedBatch:
    """Lay out the rows of a forward pass as tensors.

    Args:
        rows: Indices of the images of each row.
        image_ids: Id of each image, by index.
        texts: Tokenised texts of each image, by index.
        patches_NPD: float16, in the order of the images in the rows.
        number: Of the pass within its step.
    """
    patches = patches_NPD.shape[1]
    row_length = max(sum(image_length(texts[image], patches) for image in row) for row in rows)
    token_ids, positions, text_ids = np.zeros((3, len(rows) * row_length), np.int64)
    image_numbers = np.full(len(rows) * row_length, PADDING)
    patch_slots: list[NDArray[np.int64]] = []
    target_slots: list[NDArray[np.int64]] = []
    target_ids: list[NDArray[np.int64]] = []
    for row_number, row in enumerate(rows):
        start = row_number * row_length
        for image_number, image in enumerate(row):
            end = start + patches
            last_patch = end - 1
            patch_slots.append(np.arange(start, end))
            positions[start:end] = np.arange(patches)
            for text_id, text in enumerate(texts[image], start=1):
                ids, is_target = np.array(text.token_ids), np.array(text.is_target)
                place = slice(end, end + len(ids) - 1)
                # Each position predicts the next token; the last patch predicts the first token.
                predicting = np.array([last_patch, *range(place.start, place.stop)])
                target_slots.append(predicting[is_target])
                target_ids.append(ids[is_target])
                token_ids[place] = ids[:-1]
                positions[place] = np.arange(patches, patches + len(ids) - 1)
                text_ids[place] = text_id
                end = place.stop
            image_numbers[start:end] = image_number
            start = end
    shape = (len(rows), row_length)
    return PackedBatch(
        number=number,
        image_ids=np.array([image_ids[image] for row in rows for image in row]),
        patches_NPD=patches_NPD,
        token_ids=torch.from_numpy(token_ids).reshape(shape),
        positions=torch.from_numpy(positions).reshape(shape),
        image_numbers=torch.from_numpy(image_numbers).reshape(shape),
        text_ids=torch.from_numpy(text_ids).reshape(shape),
        patch_slots=torch.from_numpy(np.concatenate(patch_slots)),
        target_slots=torch.from_numpy(np.concatenate(target_slots)),
        target_ids=torch.from_numpy(np.concatenate(target_ids)),
    )
