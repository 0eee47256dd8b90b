"""Packs images and their texts into rows, and rows into the tensors of a forward pass.

All texts of an image stand behind one copy of its patches, and of the lead: the constant tokens
before the patches, if the prompt format has any. Each text sees lead, patches and itself, at the
positions that it would have alone. So loss and gradients equal those of one sequence per text, for
a fraction of the tokens. Several images are packed into a row.

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

BLOCK = 128
"""Positions of a block of FlexAttention's."""

LENGTHS_PER_OCTAVE = 16
"""Row lengths between a power of two and the next one, from 2,048 on: 1/17 of a row is padding at
most."""

PADDING = -1
"""Image number of positions that hold nothing."""

Row = list[int]
"""Indices of the images in a row."""


@dataclass(frozen=True)
class Pass:
    """The rows of a forward pass."""

    rows: list[Row]
    row_length: int
    """Positions of each row, padding included."""

    @property
    def num_slots(self) -> int:
        """Positions of the pass, padding included."""
        return len(self.rows) * self.row_length


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
    """int64 [R, T]: position ids, from 0 at the lead or the first patch; every text of an image
    begins behind the last patch."""
    image_numbers: Tensor
    """int64 [R, T]: 0, 1, ... the images of a row, or PADDING."""
    text_ids: Tensor
    """int64 [R, T]: 0 for lead and patches, then 1, 2, ... the texts of an image."""
    patch_slots: Tensor
    """int64 [N x P / pool^2]: slots of the patches, or of the squares that a pool makes of them."""
    target_slots: Tensor
    """int64 [S]: the slot that predicts each supervised token. The last patch of an image predicts
    the first tokens of all its texts."""
    target_ids: Tensor
    """int64 [S]: the supervised tokens, text by text."""
    block: Tensor | None = None
    """uint8: the memory of all tensors above, if they share one block."""

    def in_one_block(self, *, pin_memory: bool) -> "PackedBatch":
        """Return a copy whose tensors share one block of main memory, so that one copy moves them.

        Only from pinned memory does a GPU copy while it computes.
        """
        size = sum(_aligned(tensor.nbytes) for tensor in self._tensors().values())
        block = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
        copy = self._views_into(block)
        for name, tensor in copy._tensors().items():
            tensor.copy_(getattr(self, name))
        return copy

    def to(self, device: torch.device) -> "PackedBatch":
        """Return the batch on a device; does not wait for a copy from pinned memory."""
        if self.block is not None:
            return self._views_into(self.block.to(device, non_blocking=True))
        moved: dict[str, Any] = {name: t.to(device) for name, t in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        named = {name: value for name, value in vars(self).items() if name != "block"}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def _views_into(self, block: Tensor) -> "PackedBatch":
        """Return a batch of the same shapes whose tensors are views of a block of bytes."""
        views: dict[str, Any] = {}
        start = 0
        for name, tensor in self._tensors().items():
            view = block[start : start + tensor.nbytes].view(tensor.dtype)
            views[name] = view.view(tensor.shape)
            start += _aligned(tensor.nbytes)
        return replace(self, **views, block=block)


def _aligned(num_bytes: int) -> int:
    """Round up to a multiple of 64, at which tensors of every dtype may begin."""
    return -(-num_bytes // 64) * 64


def image_length(texts: Sequence[TokenizedText], patches: int, lead: int = 0) -> int:
    """Return how many positions an image takes.

    These are the lead, its patches, pooled if the projector pools them, and the tokens of its
    texts, without the last token of each text, which is only predicted.
    """
    return lead + patches + sum(len(text.token_ids) - 1 for text in texts)


def padded_length(length: int) -> int:
    """Return the row length of a forward pass on a GPU: one of 16 an octave, all multiples of 128.

    Few lengths mean few compilations and little fragmentation of the memory. FlexAttention computes
    blocks of 128 positions.
    """
    octave = 1 << (length.bit_length() - 1)
    unit = max(BLOCK, octave // LENGTHS_PER_OCTAVE)
    return -(-length // unit) * unit


def pack_one_row_passes(lengths: Sequence[int], *, pass_tokens: int, num_processes: int) -> list[Pass]:
    """Pack images into forward passes of one row each, all of nearly the same length.

    FlexAttention skips the pairs of different images, so a longer row costs no more than two rows.

    Args:
        lengths: Positions of each image; at least one image.
        pass_tokens: Most positions of a pass, padding included; a longer image gets a pass of its
            own.
        num_processes: Every process gets as many passes, where the images suffice.
    """
    # Two images of more than half of a pass never share it.
    large = sum(2 * length > pass_tokens for length in lengths)
    fewest = max(math.ceil(sum(lengths) / pass_tokens), large, num_processes)
    fewest = -(-fewest // num_processes) * num_processes
    for num_passes in range(fewest, len(lengths), num_processes):
        rows = _fill_rows(lengths, num_passes)
        passes = [Pass([row], padded_length(length)) for length, row in rows]
        if all(p.row_length <= pass_tokens or len(p.rows[0]) == 1 for p in passes):
            return passes
    return [Pass([[image]], padded_length(length)) for image, length in enumerate(lengths)]


def pack(lengths: Sequence[int], *, row_tokens: int, pass_tokens: int) -> list[Pass]:
    """Pack images into rows, and rows into forward passes, with little padding.

    The loss of a step does not depend on how it is packed.

    Args:
        lengths: Positions of each image; at least one image.
        row_tokens: Most positions of a row; an image that is longer gets a row of its own.
        pass_tokens: Most positions of a forward pass, padding included; a pass has at least one
            row.
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
        if not best or num_slots(passes) < num_slots(best):
            best = passes
    return best


def num_slots(passes: Sequence[Pass]) -> int:
    """Return the positions of packed passes, padding included."""
    return sum(part.num_slots for part in passes)


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
    # The longest row first: it decides the width of its pass.
    for length, row in sorted(rows, key=lambda row: -row[0]):
        if not passes or passes[-1].num_slots + passes[-1].row_length > pass_tokens:
            passes.append(Pass([], length))
        passes[-1].rows.append(row)
    return passes


def collate(
    packed: Pass,
    image_ids: Sequence[int],
    texts: Sequence[Sequence[TokenizedText]],
    patches_NPD: Tensor,
    number: int = 0,
    lead: Sequence[int] = (),
    *,
    pool: int = 1,
) -> PackedBatch:
    """Lay out the rows of a forward pass as tensors.

    Args:
        packed: Rows and row length.
        image_ids: Id of each image, by index.
        texts: Tokenised texts of each image, by index.
        patches_NPD: float16, in the order of the images in the rows.
        number: Of the pass within its step.
        lead: Tokens before the patches of every image.
        pool: The projector's: a square of pool x pool patches takes one position.
    """
    patches = patches_NPD.shape[1] // pool**2
    shared = len(lead) + patches
    rows, row_length = packed.rows, packed.row_length
    token_ids, positions, text_ids = np.zeros((3, len(rows) * row_length), np.int64)
    image_numbers = np.full(len(rows) * row_length, PADDING)
    patch_slots: list[NDArray[np.int64]] = []
    target_slots: list[NDArray[np.int64]] = []
    target_ids: list[NDArray[np.int64]] = []
    for row_number, row in enumerate(rows):
        start = row_number * row_length
        for image_number, image in enumerate(row):
            end = start + shared
            last_patch = end - 1
            token_ids[start : start + len(lead)] = lead
            patch_slots.append(np.arange(end - patches, end))
            positions[start:end] = np.arange(shared)
            for text_id, text in enumerate(texts[image], start=1):
                ids, is_target = np.array(text.token_ids), np.array(text.is_target)
                place = slice(end, end + len(ids) - 1)
                # Each position predicts the next token; the last patch predicts the first token.
                predicting = np.array([last_patch, *range(place.start, place.stop)])
                target_slots.append(predicting[is_target])
                target_ids.append(ids[is_target])
                token_ids[place] = ids[:-1]
                positions[place] = np.arange(shared, shared + len(ids) - 1)
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
