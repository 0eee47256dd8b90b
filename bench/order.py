"""What a windowed order costs in mixing, and what it saves on a disk.

    python -m bench.order

Mixing is counted on COCO's size: 118,287 images in shards of 1024 on the mean. Two figures say how
far a batch is from an even draw: from how many shards its rows come, and how many times the
variance of its mean is that of an even draw, for a property that all rows of a shard share. The
second is the worst there is: ids that say nothing about the picture share no property at all.

Reading is timed on a store of 1.2 GB whose files were dropped from the page cache (`bench.pages`):
one epoch through `train.data.prefetch.FeatureBatches`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import pages
from bench.command import benchmark_parser, run_benchmark
from bench.measure import interleaved, medians, rate_of, summary
from bench.stores import SHARD_ROWS, SPEC, make_random_store
from cache import FeatureStore
from cache.plan import plan_shards
from train.data.order import global_order, windowed_order
from train.data.prefetch import FeatureBatches

LARGEST_ID = 581_929
"""Of COCO train2017."""
WINDOWS = (1, 4, 16, 64)
BATCH = 256
"""Captions of a step in the real settings, at one image each."""
WINDOW = 4
"""Where a store is read."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    images: int
    """Whose order is counted."""
    epochs: int
    """Of them."""
    rows: int
    """Of the store that is read."""
    rounds: int


FULL = Sizes(images=118_287, epochs=5, rows=16_384, rounds=3)
QUICK = Sizes(images=20_000, epochs=1, rows=4096, rounds=1)


def coco_shards(images: int) -> NDArray[np.int64]:
    """Return the shard of each of so many images, with ids like COCO's."""
    image_ids = np.sort(np.random.default_rng(0).choice(LARGEST_ID, images, replace=False))
    plan = plan_shards(image_ids, image_ids.astype(np.uint64), SPEC.fingerprint, SHARD_ROWS)
    return np.repeat(np.arange(len(plan)), [len(shard.image_ids) for shard in plan])


def batches_of(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cut an order into whole batches: [batches, BATCH]."""
    return order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)


def mixing(
    shards: NDArray[np.int64], order: Callable[[int], NDArray[np.int64]], epochs: int
) -> dict[str, float]:
    """Return how far the batches of some epochs are from even draws."""
    drawn = np.concatenate([shards[batches_of(order(epoch))] for epoch in range(epochs)])
    property_of_shard = np.random.default_rng(1).standard_normal(shards.max() + 1)
    even = property_of_shard[shards].var() / BATCH
    return {
        "shards_in_a_batch": float(np.mean([len(set(batch)) for batch in drawn.tolist()])),
        "variance_of_the_mean": float(property_of_shard[drawn].mean(axis=1).var() / even),
    }


def measure_mixing(sizes: Sizes) -> dict[str, dict[str, float]]:
    """Return the figures of every order, and how much of ViT-B/32 two windows take."""
    shards = coco_shards(sizes.images)
    row_bytes = SPEC.patches * SPEC.width * 2
    found = {"global": mixing(shards, partial(global_order, len(shards), 0), sizes.epochs)}
    for window in WINDOWS:
        order = mixing(shards, partial(windowed_order, shards, window, 0), sizes.epochs)
        found[f"windowed, {window} shards"] = order | {
            "two_windows_gb": 2 * window * SHARD_ROWS * row_bytes / 1e9
        }
    return found


def epoch(folder: Path, kind: str) -> int:
    """Read a store once, from the disk, in one of three ways."""
    store = FeatureStore(folder)
    order = global_order(len(store), 0, 0)
    if kind != "global":
        order = windowed_order(store.shards_of(store.image_ids), WINDOW, 0, 0)
    ahead = WINDOW * SHARD_ROWS // BATCH if kind.endswith("read ahead") else 0
    batches = list(store.image_ids[batches_of(order)])
    source = FeatureBatches(store, batches, torch.device("cpu"), read_ahead=ahead)
    return sum(len(features_BPD) for features_BPD in source)


def cold(folder: Path, kind: str) -> float:
    """Drop the files from the page cache and return rows a second of one epoch."""
    pages.drop(folder)
    return rate_of(partial(epoch, folder, kind))()


def measure(sizes: Sizes) -> dict[str, Any]:
    """Measure and print both tables; return what the result file says."""
    found = measure_mixing(sizes)
    print(f"\norder: batches of {BATCH} of {sizes.images:,} images")
    print(f"  {'':<22} {'shards in a batch':>18} {'variance of the mean':>21} {'GB':>6}")
    for name, figures in found.items():
        shards, variance, *gigabytes = figures.values()
        size = f"{gigabytes[0]:>6.1f}" if gigabytes else ""
        print(f"  {name:<22} {shards:>18.1f} {variance:>20.1f}x {size}")
    with tempfile.TemporaryDirectory() as folder:
        store = make_random_store(Path(folder), sizes.rows)
        pages.sync(store)
        kinds = ("global", "windowed", "windowed, read ahead")
        runs = interleaved({kind: partial(cold, store, kind) for kind in kinds}, sizes.rounds)
    print(f"\norder: one epoch of {sizes.rows:,} rows from the disk, median rows/s")
    for name, rate in medians(runs).items():
        print(f"  {name:<22} {rate:>10,.0f}")
    setting = {"images": sizes.images, "batch": BATCH, "rows": sizes.rows, "window": WINDOW}
    return {
        "setting": setting | {"epochs": sizes.epochs, "shard_rows": SHARD_ROWS},
        "mixing": found,
        "cold": summary(runs, digits=0),
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "order",
        lambda arguments: measure(QUICK if arguments.quick else FULL),
        benchmark_parser(__doc__),
        minutes=1,
        quick_seconds=15,
        libraries=("numpy", "torch"),
    )


if __name__ == "__main__":
    main()
