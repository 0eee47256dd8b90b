"""What is done with a store of full size: the part of `bench.full_coco` that runs in own processes.

Each function works in a workspace, returns seconds and rates, and is called in a process of its
own by `bench.child.call_measured`.
"""

import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bench.order import epoch
from bench.stores import SHARD_ROWS, SPEC, random_rows
from cache import FeatureStore, Spec, write_store
from cache.plan import plan_shards
from pipeline.images.source import read_source
from workspace.paths import FEATURES

STORE_SPEC = Spec.external(
    model="stub", about="random features", patches=SPEC.patches, width=SPEC.width
)
BATCH = 64
GATHER_SECONDS = 10.0


def plan() -> dict[str, float]:
    """Plan the shards of all indexed images."""
    source, started = read_source(), time.perf_counter()
    shards = plan_shards(source.image_ids, source.source_xxh3, STORE_SPEC.fingerprint, SHARD_ROWS)
    return {"seconds": time.perf_counter() - started, "shards": len(shards)}


def write(folder: str) -> dict[str, float]:
    """Write features of all indexed images into a folder, as `cache.write_store` does."""
    started = time.perf_counter()
    store = write_store(folder, STORE_SPEC, _stub_encoder(), shard_rows=SHARD_ROWS)
    return _rates(started, len(store), store.num_bytes) | {"bytes": store.num_bytes}


def open_store() -> dict[str, float]:
    """Open the store."""
    started = time.perf_counter()
    FeatureStore(FEATURES)
    return {"seconds": time.perf_counter() - started}


def verify() -> dict[str, float]:
    """Verify every byte of the store."""
    started = time.perf_counter()
    store = FeatureStore(FEATURES)
    report = store.verify(deep=True)
    if not report.ok:
        raise RuntimeError(f"{FEATURES}: {report.problems[0]}")
    return _rates(started, len(store), store.num_bytes)


def gather() -> dict[str, float]:
    """Gather random batches for some seconds."""
    store, rng, rows = FeatureStore(FEATURES), np.random.default_rng(0), 0
    out = np.empty((BATCH, SPEC.patches, SPEC.width), np.float16)
    started = time.perf_counter()
    while time.perf_counter() - started < GATHER_SECONDS:
        store.gather(rng.choice(store.image_ids, BATCH), out)
        rows += BATCH
    return _rates(started, rows, rows * out[0].nbytes)


def epoch_in_order(kind: str) -> dict[str, float]:
    """Read all rows once, in an order of `bench.order.epoch`."""
    started = time.perf_counter()
    rows = epoch(FEATURES, kind)
    return _rates(started, rows, rows * SPEC.patches * SPEC.width * 2)


def _stub_encoder() -> Iterator[tuple[int, int, NDArray[np.float16]]]:
    source, rng = read_source(), np.random.default_rng(0)
    images = list(zip(source.image_ids.tolist(), source.source_xxh3.tolist(), strict=True))
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        for (image_id, source_xxh3), row in zip(batch, random_rows(rng, len(batch)), strict=True):
            yield image_id, source_xxh3, row


def _rates(started: float, rows: int, num_bytes: int) -> dict[str, float]:
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "gb_per_second": num_bytes / seconds / 1e9,
    }
