"""How opening, reading and memory grow with the rows of a store.

    python -m bench.scale

Stores of small rows, so that a million of them fit a test machine; what is measured depends on the
number of rows and of shards. Every figure is the median over fresh processes (`bench.opening`),
the sizes interleaved round by round. All files are in the page cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.command import benchmark_parser, run_benchmark
from bench.measure import at_least, at_most, medians, print_goals
from bench.stores import SHARD_ROWS, SPEC, make_random_store
from cache import FeatureStore

SIZES, QUICK_SIZES = (10_000, 100_000, 1_000_000), (1000, 10_000)
SMALL = replace(SPEC, patches=4, width=16)
ROUNDS = 7
"""Fresh processes for each size."""

FIGURES = (
    "open_seconds",
    "first_reads_seconds",
    "rows_per_second",
    "memory_rows_per_second",
    "open_bytes",
    "open_peak_bytes",
)
"""What a process of `bench.opening` reports."""

OPEN_SECONDS, RATE_SHARE, ROW_BYTES = 1.0, 0.8, 50.0
"""The goals: opening the largest store, its rate beside the smallest's, memory a row."""

ROOT = Path(__file__).parents[1]


def probe(store: Path) -> dict[str, float]:
    """Open a store in a fresh process, gather from it, and return what the process found."""
    command = [sys.executable, "-m", "bench.opening", str(store)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def probe_all(stores: dict[int, Path], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Return the figures of all processes, by size; a first round is not counted."""
    runs: dict[int, dict[str, list[float]]] = {
        size: {figure: [] for figure in FIGURES} for size in stores
    }
    for number in range(rounds + 1):
        for size, store in stores.items():
            found = probe(store)
            if number:
                for figure in FIGURES:
                    runs[size][figure].append(found[figure])
    return runs


def goals_of(median: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Return what was wanted and what was found."""
    small, large = median[min(median)], median[max(median)]
    more_rows = max(median) - min(median)

    def bytes_a_row(figure: str) -> float:
        return (large[figure] - small[figure]) / more_rows

    rate = large["rows_per_second"] / small["rows_per_second"]
    memory_rate = large["memory_rows_per_second"] / small["memory_rows_per_second"]
    return {
        f"seconds to open {max(median):,} rows": at_most(OPEN_SECONDS, large["open_seconds"]),
        "rate of the largest / rate of the smallest": at_least(RATE_SHARE, rate),
        "the same, beside that of an array in memory": at_least(RATE_SHARE, rate / memory_rate),
        "bytes a row, after opening": at_most(ROW_BYTES, bytes_a_row("open_bytes")),
    }


def print_figures(median: dict[int, dict[str, float]], shards: dict[int, int]) -> None:
    """Print a line a store."""
    print("\nscale: medians; memory is growth since before the store was opened, in MB")
    print(
        f"  {'rows':>9} {'shards':>7} {'open s':>8} {'rows/s':>12} {'array':>12} {'open':>8} "
        f"{'peak':>8}"
    )
    for size, found in median.items():
        megabytes = [found[figure] / 1e6 for figure in ("open_bytes", "open_peak_bytes")]
        print(
            f"  {size:>9,} {shards[size]:>7,} {found['open_seconds']:>8.3f} "
            f"{found['rows_per_second']:>12,.0f} {found['memory_rows_per_second']:>12,.0f} "
            f"{megabytes[0]:>8.1f} {megabytes[1]:>8.1f}"
        )


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the stores, measure and print; return what the result file says."""
    sizes, rounds = (QUICK_SIZES, 1) if arguments.quick else (SIZES, ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        stores = {size: make_random_store(Path(folder) / str(size), size, SMALL) for size in sizes}
        shards = {size: FeatureStore(store).num_shards for size, store in stores.items()}
        runs = probe_all(stores, rounds)
    median = {size: medians(figures) for size, figures in runs.items()}
    goals = goals_of(median)
    print_figures(median, shards)
    print_goals(goals)
    return {
        "setting": {
            "patches": SMALL.patches,
            "width": SMALL.width,
            "shard_rows": SHARD_ROWS,
            "shards": shards,
        },
        "processes": rounds,
        "median": median,
        "runs": runs,
        "goals": goals,
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "scale",
        measure,
        benchmark_parser(__doc__),
        minutes=3,
        quick_seconds=30,
        libraries=("h5py", "numpy", "pyarrow"),
    )


if __name__ == "__main__":
    main()
