"""What one process pays for a store: the part of `bench.scale` that runs in fresh processes.

    python -m bench.opening <store>

Prints one JSON object: seconds, rows a second, and bytes of memory. Opening comes first, so that
nothing of this store has been used before; then every shard is used once; then every row is read,
so that what follows finds all pages mapped; then random batches are timed, beside
random batches of an array in memory, which has the same misses of the processor's caches.
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache import FeatureStore
from cache.cli.command import command_parser, run_guarded

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


def rows_per_second(read: Callable[[NDArray[np.int64]], object], num_rows: int) -> float:
    """Read batches of random rows for a second."""
    batches = np.random.default_rng(0).integers(0, num_rows, (DRAWN, BATCH))
    for numbers in batches:
        read(numbers)
    started, rows = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < SECONDS:
        for numbers in batches[:BATCH]:
            read(numbers)
        rows += BATCH * BATCH
        batches = np.roll(batches, BATCH, axis=0)
    return rows / seconds


def rates(store: FeatureStore) -> dict[str, float]:
    """Gather from the store, whose ids are 0, 1, 2, ..., and from an array of its size."""
    out = np.empty((BATCH, store.spec.patches, store.spec.width), np.float16)
    found = rows_per_second(lambda ids: store.gather(ids, out), len(store))
    array = store.gather(store.image_ids)
    memory = rows_per_second(
        lambda ids: np.take(array, ids, axis=0, out=out, mode="clip"), len(store)
    )
    return {"rows_per_second": found, "memory_rows_per_second": memory}


def measure(root: Path) -> None:
    """Measure and print."""
    store, found = opened(root)
    found["first_reads_seconds"] = first_reads(store)
    read_all(store)
    print(json.dumps(found | rates(store)))


def main() -> None:
    """Read the command line and measure."""
    parser = command_parser(__doc__)
    parser.add_argument("store", type=Path)
    root = parser.parse_args().store
    run_guarded(lambda: measure(root))


if __name__ == "__main__":
    main()
