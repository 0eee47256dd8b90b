"""Counts the bytes of a store from its shape: shards, index, and the limits that they meet.

A shard file has pages of 4096 bytes (`cache.shard.ALIGNMENT`): three before the features, and one
of metadata before `image_id` and before `row_xxh3`. Letters: P patches, D width.
"""

import json
import math
from dataclasses import dataclass

from cache.files.parquet import MAX_ENTRIES, MAX_FOOTER_BYTES
from cache.shard import ALIGNMENT, USUAL_OFFSET
from cache.store_index import READ_ROWS

HEAD_BYTES = USUAL_OFFSET
"""Before the features: superblock, root group and the spec."""

ID_BYTES = HASH_BYTES = 8
"""Of an entry of `image_id` and of `row_xxh3`."""

OVERHEAD_BYTES = HEAD_BYTES + 2 * ALIGNMENT + ALIGNMENT
"""What a shard has besides its rows: two ends of a dataset fill half of their page on average."""

MAX_PLANNED_SHARDS = 16_000
"""Most shards of a planned store. Linux allows a process 65,530 mappings unless it is told
otherwise, a mapped shard takes two of them, and half is left for everything else."""

MAX_SHARD_BYTES = 600e6
"""Most bytes of a planned store's mean shard: what an encoder holds in memory, up to twice."""

MAX_IMAGES = 50_000_000
"""Most images of a planned store: its index takes one GB of memory in each process that reads."""

USUAL_SHARD_ROWS = 1024
"""`extract.shard_rows` of configs/coco.yaml."""


@dataclass(frozen=True)
class Tower:
    """The shape of a CLIP vision tower."""

    name: str
    image_size: int
    patch_size: int
    width: int
    """D."""
    blocks: int

    @property
    def patches(self) -> int:
        """P, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def row_bytes(self) -> int:
        """Bytes of an image's features."""
        return self.patches * self.width * 2


B32 = Tower("ViT-B/32", 224, 32, 768, 12)
L14 = Tower("ViT-L/14", 224, 14, 1024, 24)
L14_336 = Tower("ViT-L/14-336", 336, 14, 1024, 24)
TOWERS = (B32, L14, L14_336)


@dataclass(frozen=True)
class IndexShape:
    """Bytes of `index.parquet`, measured by `bench.large_index`."""

    row_bytes: float
    """Of a row, its part of pages and dictionaries."""
    group_bytes: float
    """Of the footer, for a row group of 65,536 rows."""


def shard_bytes(rows: int, row_bytes: int) -> int:
    """Return the exact size of a shard file."""
    ids = _next_page(HEAD_BYTES + rows * row_bytes) + ALIGNMENT
    hashes = _next_page(ids + rows * ID_BYTES) + ALIGNMENT
    return hashes + rows * HASH_BYTES


def _next_page(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def mean_shard_rows(shard_rows: int) -> float:
    """Return the mean rows of a shard: cuts are random, and none is later than twice the setting.

    Args:
        shard_rows: The setting.
    """
    return shard_rows * float(-math.expm1(2 * shard_rows * math.log1p(-1 / shard_rows)))


def mean_shards(images: int, shard_rows: int) -> float:
    """Return the expected number of shards of a store."""
    return max(1.0, images / mean_shard_rows(shard_rows))


def feature_bytes(images: int, row_bytes: int, shard_rows: int) -> float:
    """Return the expected size of all shards of a store."""
    rows = images * (row_bytes + ID_BYTES + HASH_BYTES)
    return rows + mean_shards(images, shard_rows) * OVERHEAD_BYTES


def entry_bytes(num_bytes: float) -> int:
    """Return the bytes of a shard's entry in the footer of the index."""
    entry = {f"{0:016x}.h5": {"bytes": round(num_bytes), "sha256": "0" * 64}}
    return len(json.dumps(entry)) - len("{}") + len(", ")


def footer_bytes(images: int, shards: float, mean_bytes: float, index: IndexShape) -> float:
    """Return the bytes of an index's footer; a reader refuses more than 16 MiB.

    Args:
        images: Rows.
        shards: Number of shards.
        mean_bytes: Size of a shard.
        index: What was measured.
    """
    groups = math.ceil(images / READ_ROWS)
    return shards * entry_bytes(mean_bytes) + groups * index.group_bytes


def index_bytes(images: int, shards: float, mean_bytes: float, index: IndexShape) -> float:
    """Return the bytes of `index.parquet`; the arguments are those of `footer_bytes`."""
    return images * index.row_bytes + footer_bytes(images, shards, mean_bytes, index)


def most_images(tower: Tower, shard_rows: int, index: IndexShape) -> int:
    """Return how many images one index can have before a reader refuses it."""
    rows = mean_shard_rows(shard_rows)
    entry = entry_bytes(rows * tower.row_bytes)
    by_footer = MAX_FOOTER_BYTES / (entry / rows + index.group_bytes / READ_ROWS)
    return int(min(by_footer, MAX_ENTRIES * READ_ROWS))


@dataclass(frozen=True)
class StorePlan:
    """How many images are best laid out: equal stores side by side."""

    stores: int
    images: int
    """Of a store."""
    shard_rows: int
    shards: float
    """Of a store."""
    features: float
    """Bytes of a store's shards."""

    @property
    def shard_bytes(self) -> float:
        """Mean size of a shard."""
        return self.features / self.shards


def plan_stores(images: int, tower: Tower) -> StorePlan:
    """Choose stores and `shard_rows` so that a store's shards can be mapped and held in memory.

    `shard_rows` is the usual number, or that times a power of two: as small as the number of
    shards allows, and no larger than the memory of an encoder allows.
    """
    largest = USUAL_SHARD_ROWS * 2.0 ** math.floor(
        math.log2(MAX_SHARD_BYTES / (mean_shard_rows(USUAL_SHARD_ROWS) * tower.row_bytes))
    )
    most = min(MAX_IMAGES, int(MAX_PLANNED_SHARDS * mean_shard_rows(int(largest))))
    stores = math.ceil(images / most)
    each = math.ceil(images / stores)
    shard_rows = min(USUAL_SHARD_ROWS, int(largest))
    while mean_shards(each, shard_rows) > MAX_PLANNED_SHARDS:
        shard_rows *= 2
    return StorePlan(
        stores,
        each,
        shard_rows,
        mean_shards(each, shard_rows),
        feature_bytes(each, tower.row_bytes, shard_rows),
    )
