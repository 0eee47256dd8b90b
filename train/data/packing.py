"""The shape of what the model sees: how images and their texts become tensors.

All texts of an image stand behind one copy of its patches. Each sees the patches and itself, at the
positions that it would have alone, so that loss and gradients are those of one sequence a text, for
a fraction of the tokens. Several images are packed in a row.

    row        patches   text 1   text 2   patches   text 1   padding
    image      0 0 0 0   0 0 0    0 0      1 1 1 1   1 1 1    -1 -1
    text       0 0 0 0   1 1 1    2 2      0 0 0 0   1 1 1     0  0
    position   0 1 2 3   4 5 6    4 5      0 1 2 3   4 5 6     0  0

Letters: R rows, T positions of a row, N images, P patches, S supervised tokens, U slots that
predict them.
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.data.prompts import Branch

TRIALS = 8
"""How many more rows than the fewest are tried: with images of like length, rows that hold four of
them each are shorter than rows of four and five."""

PADDING = -1
"""Image of positions that hold nothing."""


@dataclass(frozen=True)
class ImageTexts:
    """One image and its tokenised texts."""

    image_id: int
    branches: tuple[Branch, ...]

    @property
    def num_text_tokens(self) -> int:
        """Text positions: a branch's last token is predicted, never read."""
        return sum(len(branch.token_ids) - 1 for branch in self.branches)


Row = list[ImageTexts]
"""Images that stand in one row of positions, one behind the other."""


@dataclass(frozen=True)
class PackedBatch:
    """What one forward pass needs, besides the patches. A slot is a place in R x T, row by row."""

    image_ids: NDArray[np.int64]
    """[N], in the order of the patches."""
    token_ids: Tensor
    """int64 [R, T]: 0 where patches or nothing stand."""
    positions: Tensor
    """int64 [R, T]: of each token in its own text, patches before it included."""
    images: Tensor
    """int64 [R, T]: 0, 1, ... the images of a row, PADDING."""
    texts: Tensor
    """int64 [R, T]: 0 the patches, then 1, 2, ... the texts of an image."""
    patch_slots: Tensor
    """int64 [N x P]: where the patches stand."""
    slots: Tensor
    """int64 [U], ascending: the slots that predict supervised tokens."""
    counts: Tensor
    """int64 [U]: how many each of them predicts; the last patch predicts all first tokens."""
    targets: Tensor
    """int64 [S]: the supervised tokens, those of the first of `slots` first."""

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the same on a device."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return PackedBatch(image_ids=self.image_ids, **tensors)


def pack(
    images: Sequence[ImageTexts], patches: int, *, row_tokens: int, pass_tokens: int
) -> list[list[Row]]:
    """Pack images into rows, and rows into forward passes, with as little padding as is found.

    The loss of a step does not depend on how it is packed.

    Args:
        images: At least one.
        patches: P, the same for all.
        row_tokens: Most positions of a row; an image that is longer stands alone.
        pass_tokens: Most positions of a forward pass, padding included; at least one row.

    Returns:
        The rows of each pass.
    """
    total = sum(patches + image.num_text_tokens for image in images)
    fewest = min(math.ceil(total / row_tokens), len(images))
    best: list[_Pass] = []
    for num_rows in range(fewest, len(images) + 1):
        if best and num_rows > fewest + TRIALS:
            break
        rows = _fill_evenly(images, patches, num_rows)
        if any(length > row_tokens and len(row) > 1 for length, row in rows):
            continue
        passes = _cut(rows, pass_tokens)
        if not best or _slots(passes) < _slots(best):
            best = passes
    return [one.rows for one in best]


@dataclass
class _Pass:
    width: int
    rows: list[Row]


def _cut(rows: list[tuple[int, Row]], pass_tokens: int) -> list[_Pass]:
    """Put rows of like length into one pass."""
    passes: list[_Pass] = []
    # The longest first: it decides the width of its pass.
    for length, row in sorted(rows, key=lambda row: -row[0]):
        if not passes or (len(passes[-1].rows) + 1) * passes[-1].width > pass_tokens:
            passes.append(_Pass(length, []))
        passes[-1].rows.append(row)
    return passes


def _slots(passes: list[_Pass]) -> int:
    return sum(one.width * len(one.rows) for one in passes)


def _fill_evenly(
    images: Sequence[ImageTexts], patches: int, num_rows: int
) -> list[tuple[int, Row]]:
    """Put the longest image that is left into the shortest row; return lengths and rows."""
    rows: list[Row] = [[] for _ in range(num_rows)]
    shortest = [(0, number) for number in range(num_rows)]
    for image in sorted(images, key=lambda image: -image.num_text_tokens):
        length, number = shortest[0]
        rows[number].append(image)
        heapq.heapreplace(shortest, (length + patches + image.num_text_tokens, number))
    return [(length, rows[number]) for length, number in shortest]


def collate(rows: Sequence[Row], patches: int) -> PackedBatch:
    """Lay out the rows of a forward pass as tensors.

    Args:
        rows: R rows of images with their branches.
        patches: P, the same for all.
    """
    width = max(sum(patches + image.num_text_tokens for image in row) for row in rows)
    token_ids, positions, texts = np.zeros((3, len(rows) * width), np.int64)
    images = np.full(len(rows) * width, PADDING)
    patch_slots: list[NDArray[np.int64]] = []
    targets: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        start = number * width
        for image_number, image in enumerate(row):
            behind = start + patches
            patch_slots.append(np.arange(start, behind))
            positions[start:behind] = np.arange(patches)
            for text, branch in enumerate(image.branches, start=1):
                targets += _targets(branch, last_patch=start + patches - 1, first=behind)
                there = slice(behind, behind + len(branch.token_ids) - 1)
                token_ids[there] = branch.token_ids[:-1]
                positions[there] = np.arange(patches, patches + len(branch.token_ids) - 1)
                texts[there] = text
                behind = there.stop
            images[start:behind] = image_number
            start = behind
    # Of this shape too when a question was too long for its answer, and nothing is learned.
    target_slots, target_ids = (
        np.array(sorted(targets, key=itemgetter(0)), np.int64).reshape(-1, 2).T.copy()
    )
    slots, counts = np.unique(target_slots, return_counts=True)
    shape = (len(rows), width)
    return PackedBatch(
        image_ids=np.array([image.image_id for row in rows for image in row]),
        token_ids=torch.from_numpy(token_ids).reshape(shape),
        positions=torch.from_numpy(positions).reshape(shape),
        images=torch.from_numpy(images).reshape(shape),
        texts=torch.from_numpy(texts).reshape(shape),
        patch_slots=torch.from_numpy(np.concatenate(patch_slots)),
        slots=torch.from_numpy(slots),
        counts=torch.from_numpy(counts),
        targets=torch.from_numpy(target_ids),
    )


def _targets(branch: Branch, *, last_patch: int, first: int) -> Iterator[tuple[int, int]]:
    """Yield, for each supervised token, the slot that predicts it and the token.

    The first token of a branch is predicted by the last patch, which all branches share.
    """
    for index, (token_id, learned) in enumerate(zip(branch.token_ids, branch.learned, strict=True)):
        if learned:
            yield (first + index - 1 if index else last_patch), token_id
