"""Assigns images to shards, and names shards: pure functions, no files.

A shard ends after an image whose hashed id is divisible by `shard_rows`, or when it holds twice
`shard_rows` images. So adding or removing an image changes only the shards up to the next such
image (content-defined chunking, as in rsync).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from .errors import SettingsError

MAX_SHARDS = 100_000
"""Most shards of a store. The footer of its index lists them, 120 bytes each, beside 700 bytes for
every 65,536 images, and a reader takes 16 MiB of it."""


@dataclass(frozen=True)
class PlannedShard:
    """The rows of one shard, before it is encoded."""

    key: str
    """The result of `shard_key`."""
    image_ids: NDArray[np.int64]
    """[N], ascending."""
    source_xxh3: NDArray[np.uint64]
    """[N], xxh3_64 of each image file's bytes."""

    @property
    def name(self) -> str:
        """File name."""
        return f"{self.key}.h5"


def plan_shards(
    image_ids: NDArray[np.int64], source_xxh3: NDArray[np.uint64], fingerprint: str, shard_rows: int
) -> list[PlannedShard]:
    """Cut a set of images into shards.

    Args:
        image_ids: [N] in any order, without repeats.
        source_xxh3: [N] hashes of the image files, in the same order.
        fingerprint: Of the spec of the features.
        shard_rows: Expected rows of a shard; a shard has at most twice as many.

    Returns:
        The shards in order of image id. They depend on the set of images alone.
    """
    order = np.argsort(image_ids)
    image_ids, source_xxh3 = image_ids[order], source_xxh3[order]
    return [
        PlannedShard(
            shard_key(fingerprint, image_ids[start:stop], source_xxh3[start:stop]),
            image_ids[start:stop],
            source_xxh3[start:stop],
        )
        for start, stop in _shard_ranges(image_ids, shard_rows)
    ]


def check_num_shards(plan: list[PlannedShard], shard_rows: int) -> None:
    """Refuse a plan with more shards than an index can list.

    Args:
        plan: Of `plan_shards`.
        shard_rows: With which it was made.

    Raises:
        SettingsError: It has more than `MAX_SHARDS`.
    """
    if len(plan) > MAX_SHARDS:
        times = -(-len(plan) // MAX_SHARDS)
        raise SettingsError(
            f"shard_rows is {shard_rows}, which makes {len(plan)} shards of these images, wanted "
            f"at most {MAX_SHARDS} in a store. Raise it to {times * shard_rows} or more."
        )


def _shard_ranges(image_ids: NDArray[np.int64], shard_rows: int) -> Iterator[tuple[int, int]]:
    start = 0
    for stop, image_id in enumerate(image_ids.astype("<i8"), start=1):
        is_cut = xxhash.xxh3_64_intdigest(image_id.tobytes()) % shard_rows == 0
        if is_cut or stop - start == 2 * shard_rows or stop == len(image_ids):
            yield start, stop
            start = stop


def shard_key(
    fingerprint: str, image_ids: NDArray[np.int64], source_xxh3: NDArray[np.uint64]
) -> str:
    """Return 16 hexadecimal digits of a sha256 over the fingerprint, the images' ids and hashes."""
    rows = np.empty(len(image_ids), dtype=[("image_id", "<i8"), ("source_xxh3", "<u8")])
    rows["image_id"], rows["source_xxh3"] = image_ids, source_xxh3
    return hashlib.sha256(fingerprint.encode() + rows.tobytes()).hexdigest()[:16]
