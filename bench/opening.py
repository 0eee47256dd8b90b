"""What one process pays for a store: the part of `bench.scale` that runs in fresh processes.

    python -m bench.opening <store>

Prints one JSON object: seconds, rows a second, and bytes of memory. Opening comes first, so that
nothing of this store has been used before; then every shard is used once; then every row is read,
so that what follows finds all pages mapped; then random batches are timed.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache import FeatureStore

BATCH = 64
SECONDS = 1.0
"""How long batches are read for."""
DRAWN = 4096
"""Batches that are drawn ahead, so that drawing is not timed."""


def resident(figure: str) -> int:
    """Return a figure of /proc/self/status in bytes: VmRSS now, or VmHWM at most."""
    found = re.search(rf"^{figure}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) * 1024


def opened(folder: Path) -> tuple[FeatureStore, dict[str, float]]:
    """Open a store and return what that took."""
    # From here on VmHWM counts anew: what the imports took at most is not the store's.
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    store = FeatureStore(folder)
    seconds = time.perf_counter() - started
    return store, {
        "open_seconds": seconds,
        "open_bytes": resident("VmRSS") - before,
        "open_peak_bytes": resident("VmHWM") - before,
    }


def read_all(store: FeatureStore) -> None:
    """Read every row once."""
    for start in range(0, len(store), 1024):
        store.gather(store.image_ids[start : start + 1024])


def first_reads(store: FeatureStore) -> float:
    """Read a few rows of every shard, in order; return the seconds."""
    started = time.perf_counter()
    step = max(1, len(store) // (4 * store.num_shards))
    store.gather(store.image_ids[::step])
    return time.perf_counter() - started


def rows_per_second(store: FeatureStore) -> float:
    """Gather batches of random rows into one buffer, for a second."""
    rng = np.random.default_rng(0)
    batches: NDArray[np.int64] = rng.choice(store.image_ids, (DRAWN, BATCH))
    out = np.empty((BATCH, store.spec.patches, store.spec.width), np.float16)
    for image_ids in batches:
        store.gather(image_ids, out)
    started, rows = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < SECONDS:
        for image_ids in batches[:BATCH]:
            store.gather(image_ids, out)
        rows += BATCH * BATCH
        batches = np.roll(batches, BATCH, axis=0)
    return rows / seconds


def main() -> None:
    """Measure and print."""
    store, found = opened(Path(sys.argv[1]))
    found["first_reads_seconds"] = first_reads(store)
    read_all(store)
    found["rows_per_second"] = rows_per_second(store)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
