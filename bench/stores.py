"""Makes the stores that benchmarks read: rows of random finite numbers under the real format.

Values do not matter to any reader: nothing is compressed, and no two rows are alike.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache import Spec
from cache.files.atomic import sha256_of
from cache.plan import plan_shards
from cache.publish import publish
from cache.shard import write_shard
from cache.spec import FORMAT

SHARD_ROWS = 1024
"""Mean rows of a shard, as in the demo's and the real settings."""

SPEC = Spec(
    format=FORMAT,
    model="ViT-B-32-quickgelu",
    weights_sha256="0" * 64,
    activation="quick_gelu",
    layer=-2,
    tokens="patch",
    normalized=False,
    image_size=224,
    resize="shortest",
    crop="center",
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    precision="fp32",
    batch_size=64,
    dtype="float16",
    patches=49,
    width=768,
    preprocess_version=1,
)
"""Of ViT-B/32: a row is 75 KB."""

INFINITY = 0x7C00
"""As float16; every smaller unsigned number is a finite one."""


def random_rows(rng: np.random.Generator, num_rows: int, spec: Spec = SPEC) -> NDArray[np.float16]:
    """Return random finite features: float16 [num_rows, P, D]."""
    bits = rng.integers(0, INFINITY, (num_rows, spec.patches, spec.width), dtype=np.uint16)
    return bits.view(np.float16)


def make_store(
    folder: Path,
    num_rows: int,
    rows_of: Callable[[NDArray[np.int64]], NDArray[np.float16]],
    spec: Spec = SPEC,
) -> Path:
    """Write a store of the images 0 to num_rows - 1.

    Args:
        folder: An empty one; the store becomes a part of it.
        num_rows: Images.
        rows_of: Gives the features of one shard's images: float16 [N, P, D].
        spec: Of the features.

    Returns:
        The store's folder.
    """
    image_ids = np.arange(num_rows, dtype=np.int64)
    plan = plan_shards(image_ids, image_ids.astype(np.uint64), spec.fingerprint, SHARD_ROWS)
    hashes = {}
    for shard in plan:
        path = folder / "finished" / shard.name
        write_shard(path, spec, shard.image_ids, rows_of(shard.image_ids))
        hashes[shard.name] = sha256_of(path)
    publish(folder / "store", plan, folder / "finished", spec, hashes)
    return folder / "store"


def make_random_store(folder: Path, num_rows: int, spec: Spec = SPEC) -> Path:
    """Write a store of random rows; no more than a shard's are in memory at a time."""
    rng = np.random.default_rng(0)
    return make_store(folder, num_rows, lambda ids: random_rows(rng, len(ids), spec), spec)
