"""Order and shape of what the model sees: which images make a step, and how they become tensors.

All texts of an image stand in one row behind one copy of its patches. Each sees the patches and
itself, at the positions that it would have alone, so that loss and gradients are those of one
sequence a text, for a fraction of the tokens.

    row        patches   text 1   text 2   padding
    segment    0 0 0 0   1 1 1    2 2      -1 -1
    position   0 1 2 3   4 5 6    4 5      0  0

Letters: R rows, P patches, T positions of a row, S supervised tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.prompts import Branch

PADDING = -1
"""Segment of positions that hold nothing."""


@dataclass(frozen=True)
class Row:
    """One image and its tokenised texts."""

    image_id: int
    branches: tuple[Branch, ...]

    @property
    def num_text_tokens(self) -> int:
        """Text positions of the row: a branch's last token is predicted, never read."""
        return sum(len(branch.token_ids) - 1 for branch in self.branches)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass needs, besides the patches."""

    image_ids: list[int]
    """R ids."""
    token_ids: Tensor
    """int64 [R, T - P]: the text positions."""
    positions: Tensor
    """int64 [R, T]."""
    segments: Tensor
    """int64 [R, T]: 0 patches, then 1, 2, ... a text each, PADDING."""
    target_rows: Tensor
    """int64 [S]: the row of each supervised token."""
    target_positions: Tensor
    """int64 [S]: the position that predicts it."""
    targets: Tensor
    """int64 [S]: the supervised tokens."""

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same on a device."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MicroBatch(image_ids=self.image_ids, **tensors)


def plan_steps(
    sizes: Sequence[int],
    batch_size: int,
    epochs: float,
    order: Callable[[int], NDArray[np.int64]],
) -> list[list[int]]:
    """Decide which examples make which optimizer step.

    Args:
        sizes: Texts of each example.
        batch_size: Texts of a step; examples are added until there are as many.
        epochs: Passes over the examples; there is always one example at least.
        order: From an epoch to the order of all examples in it.

    Returns:
        Example numbers of each step, in order.
    """
    wanted = max(1, round(epochs * len(sizes)))
    steps: list[list[int]] = [[]]
    texts = 0
    for number in _in_order(len(sizes), wanted, order):
        if texts >= batch_size:
            steps.append([])
            texts = 0
        steps[-1].append(number)
        texts += sizes[number]
    return [step for step in steps if step]


def _in_order(
    num_examples: int, wanted: int, order: Callable[[int], NDArray[np.int64]]
) -> Iterator[int]:
    for epoch in range(-(-wanted // num_examples)):
        yield from order(epoch)[: wanted - epoch * num_examples].tolist()


def micro_batches(rows: list[Row], patches: int, max_tokens: int) -> Iterator[list[Row]]:
    """Split the rows of a step into forward passes of at most so many positions.

    Rows of like length go together; the loss of a step does not depend on the split. A row that
    is longer than `max_tokens` goes alone.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: row.num_text_tokens):
        # Sorted, so this row is the longest so far and decides the padding.
        length = patches + row.num_text_tokens
        if batch and (len(batch) + 1) * length > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def collate(rows: list[Row], patches: int) -> MicroBatch:
    """Lay some rows out as tensors.

    Args:
        rows: R images with their branches.
        patches: P, the same for all.
    """
    length = patches + max(row.num_text_tokens for row in rows)
    token_ids = torch.zeros(len(rows), length - patches, dtype=torch.int64)
    positions = torch.zeros(len(rows), length, dtype=torch.int64)
    segments = torch.full((len(rows), length), PADDING)
    positions[:, :patches] = torch.arange(patches)
    segments[:, :patches] = 0
    targets: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        start = patches
        for segment, branch in enumerate(row.branches, start=1):
            stop = start + len(branch.token_ids) - 1
            token_ids[number, start - patches : stop - patches] = torch.tensor(
                branch.token_ids[:-1]
            )
            positions[number, start:stop] = torch.arange(patches, patches + stop - start)
            segments[number, start:stop] = segment
            targets += [(number, *t) for t in _targets(branch, start, patches)]
            start = stop
    # Of this shape too when a question was too long for its answer, and nothing is learned.
    table = torch.tensor(targets, dtype=torch.int64).reshape(-1, 3)
    target_rows, target_positions, target_ids = table.T
    return MicroBatch(
        [row.image_id for row in rows],
        token_ids,
        positions,
        segments,
        target_rows,
        target_positions,
        target_ids,
    )


def _targets(branch: Branch, start: int, patches: int) -> Iterator[tuple[int, int]]:
    """Yield, for each supervised token, the position that predicts it and the token.

    The first token of a branch is predicted by the last patch, which all branches share.
    """
    for index, (token_id, learned) in enumerate(zip(branch.token_ids, branch.learned, strict=True)):
        if learned:
            yield (start + index - 1 if index else patches - 1), token_id


def attention_mask(segments: Tensor) -> Tensor:
    """Return who sees whom: bool [R, 1, T, T], query before key.

    A position sees the patches and its own text, up to itself. Padding sees only itself, since a
    query without any key has no defined attention.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=segments.device)
    seen = causal & ((key == 0) | (key == query)) & (key != PADDING)
    return (seen | itself)[:, None]
