"""How long a deep verification takes, beside reading the same files and doing nothing with them.

    python -m bench.verify

Warm: all files are in the page cache. Cold: they are dropped from it before every run (see
`bench.pages`). The command is a fresh process, start and imports included; `FeatureStore.verify`
runs in this process, opening included.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import pages
from bench.command import benchmark_parser, run_benchmark
from bench.measure import at_most, interleaved, medians, print_goals, seconds_of, summary
from bench.stores import SPEC, make_random_store
from cache import FeatureStore

ROWS, QUICK_ROWS = 49152, 1024
"""3.7 GB: a process's start should not count for much."""
WARM_ROUNDS, COLD_ROUNDS = 7, 3
MOST = 1.5
"""The goal: so many times as long as cat."""

CAT, COMMAND, CALL = "cat > /dev/null", "python -m cache.verify", "FeatureStore.verify"
ROOT = Path(__file__).parents[1]


def cat(store: Path) -> None:
    """Read all files of the store."""
    with Path("/dev/null").open("wb") as null:
        files = pages.files_of(store)
        subprocess.run(["cat", *files], stdout=null, check=True)


def command(store: Path) -> None:
    """Verify as a user does."""
    arguments = [sys.executable, "-m", "cache.verify", str(store)]
    subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def call(store: Path) -> None:
    """Verify in this process."""
    report = FeatureStore(store).verify(deep=True)
    if not report.ok:
        raise RuntimeError(f"{store}: {report.problems[0]}")


CONTENDERS: dict[str, Callable[[Path], None]] = {CAT: cat, COMMAND: command, CALL: call}


def cold_seconds(work: Callable[[Path], None], store: Path) -> float:
    """Drop the store from the page cache and return the seconds that the work takes."""
    pages.drop(store)
    return seconds_of(partial(work, store))()


def seconds_of_all(
    store: Path, warm_rounds: int, cold_rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of all runs, warm and cold."""
    pages.sync(store)
    cold = {name: partial(cold_seconds, work, store) for name, work in CONTENDERS.items()}
    warm = {name: seconds_of(partial(work, store)) for name, work in CONTENDERS.items()}
    return {
        "warm": interleaved(warm, warm_rounds),
        "cold": interleaved(cold, cold_rounds, uncounted=0),
    }


def goals_of(runs: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return what was wanted and what was found."""
    return {
        f"{kind}: {name} / {CAT}": at_most(MOST, median[name] / median[CAT])
        for kind, median in ((kind, medians(found)) for kind, found in runs.items())
        for name in (COMMAND, CALL)
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    rows = QUICK_ROWS if arguments.quick else ROWS
    warm, cold = (1, 1) if arguments.quick else (WARM_ROUNDS, COLD_ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        store = make_random_store(Path(folder), rows)
        num_bytes = FeatureStore(store).num_bytes
        runs = seconds_of_all(store, warm, cold)
    goals = goals_of(runs)
    print(f"\nverify: median seconds for {num_bytes / 1e9:.1f} GB")
    for kind, found in runs.items():
        for name, seconds in medians(found).items():
            print(f"  {kind}  {name:<30} {seconds:>8.2f} {num_bytes / seconds / 1e9:>8.2f} GB/s")
    print_goals(goals)
    return {
        "unit": "seconds",
        "setting": {"rows": rows, "patches": SPEC.patches, "width": SPEC.width, "bytes": num_bytes},
        "rounds": {"warm": warm, "cold": cold},
        **{kind: summary(found, digits=3) for kind, found in runs.items()},
        "goals": goals,
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "verify",
        measure,
        benchmark_parser(__doc__),
        minutes=2,
        quick_seconds=20,
        libraries=("h5py", "numpy", "xxhash"),
    )


if __name__ == "__main__":
    main()
