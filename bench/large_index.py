"""What the index of a store costs as it grows: bytes, seconds and memory, up to ten million images.

    python -m bench.large_index

The indexes are written and read by the store's own code; there are no shards. Ids are spread as
COCO's, five times as wide as there are images, and hashes are random, as those of real files. Each
index is read in a fresh process. The footer, of which a reader takes at most 16 MiB, lists the
shards and the row groups: what it has beside the shards' entries is a row group's part.
"""

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import benchmark_parser, run_benchmark
from bench.cost_parts.sizes import B32, USUAL_SHARD_ROWS, entry_bytes, shard_bytes
from bench.opening import resident
from bench.stores import SPEC
from cache.plan import PlannedShard, plan_shards
from cache.store_index import INDEX_FILE, READ_ROWS, ShardFile, StoreIndex

SIZES, QUICK_SIZES = (100_000, 1_000_000, 10_000_000), (1000, 70_000)
SPREAD = 5
"""Width of the range of ids, for each image."""


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Plan, write and read an index of each size; return what the result file says."""
    found = {}
    for size in QUICK_SIZES if arguments.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            found[size] = measure_size(size, Path(folder))
        print(f"large_index: {size:,} images: {found[size]}", flush=True)
    return {"setting": {"shard_rows": USUAL_SHARD_ROWS, "spread": SPREAD}, "images": found}


def measure_size(images: int, folder: Path) -> dict[str, float]:
    """Return the figures of one size."""
    rng = np.random.default_rng(0)
    image_ids = np.sort(rng.choice(SPREAD * images, images, replace=False))
    hashes = rng.integers(0, 2**64, (2, images), dtype=np.uint64)
    started = time.perf_counter()
    plan = plan_shards(image_ids, hashes[0], SPEC.fingerprint, USUAL_SHARD_ROWS)
    planned = time.perf_counter()
    index = make_index(plan, hashes[1])
    path = folder / INDEX_FILE
    writing = time.perf_counter()
    index.write(path)
    written = time.perf_counter()
    return {
        "shards": len(plan),
        "bytes": path.stat().st_size,
        "footer_bytes": footer_of(path),
        "entry_bytes": sum(entry_bytes(shard.num_bytes) for shard in index.shards),
        "row_groups": -(-images // READ_ROWS),
        "plan_seconds": round(planned - started, 3),
        "write_seconds": round(written - writing, 3),
        **in_fresh_process(path),
    }


def make_index(plan: list[PlannedShard], row_xxh3: np.ndarray[Any, Any]) -> StoreIndex:
    """Return the index that a store of these shards would have."""
    by_name = sorted(range(len(plan)), key=lambda number: plan[number].name)
    numbers = np.argsort(by_name).astype(np.int32)
    rows = [len(shard.image_ids) for shard in plan]
    digests = np.random.default_rng(1).bytes(32 * len(plan)).hex()
    return StoreIndex(
        fingerprint=SPEC.fingerprint,
        shards=tuple(
            ShardFile(
                plan[n].name, shard_bytes(rows[n], B32.row_bytes), digests[64 * n : 64 * (n + 1)]
            )
            for n in by_name
        ),
        image_ids=np.concatenate([shard.image_ids for shard in plan]),
        shard_number=np.repeat(numbers, rows),
        row=np.concatenate([np.arange(n, dtype=np.int32) for n in rows]),
        row_xxh3=row_xxh3,
        source_xxh3=np.concatenate([shard.source_xxh3 for shard in plan]),
    )


def footer_of(path: Path) -> int:
    """Return the bytes of a parquet file's footer."""
    with path.open("rb") as file:
        file.seek(-8, 2)
        return int.from_bytes(file.read(4), "little")


def in_fresh_process(path: Path) -> dict[str, float]:
    """Return the seconds and the memory that reading an index takes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(read_index, path).result()


def read_index(path: Path) -> dict[str, float]:
    """Read an index; return seconds, and the growth of memory at its end and at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before, started = resident("VmRSS"), time.perf_counter()
    index = StoreIndex.read(path, SPEC)
    seconds = time.perf_counter() - started
    assert len(index.image_ids)
    return {
        "read_seconds": round(seconds, 3),
        "read_bytes": resident("VmRSS") - before,
        "read_peak_bytes": resident("VmHWM") - before,
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "large_index",
        measure,
        benchmark_parser(__doc__),
        minutes=2,
        quick_seconds=15,
        libraries=("numpy", "pyarrow", "xxhash"),
    )


if __name__ == "__main__":
    main()
