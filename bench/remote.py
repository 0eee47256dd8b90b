"""How fast features are read from an S3 server: the first epoch, and those after it.

    python -m bench.remote

The same rows lie on one server (`bench.s3_server`) as a store and in the formats of other readers
(`bench.remote_readers`). Each reader works in a process of its own, with an empty local folder, and
with no worker processes or two, of which the faster counts. The first epoch lasts from opening to
the last row; imports come before. Every epoch must give each row once: both ends of every row are
compared. Two networks: 20 ms before each answer and the rate of one connection to S3; and 20 ms
alone, where the processor is the limit. The server shares the cores with its clients; its time is
reported beside theirs.
"""

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.command import benchmark_parser, run_benchmark
from bench.measure import at_least, print_goals
from bench.readers.contender import BATCH, PREPARE_ERRORS, Rows
from bench.remote_readers import LITDATA, LOCAL, READERS, STREAMING, WINDOWED
from bench.remote_runs import Run, run_reader, sorted_ends
from bench.s3_server import BUCKET, Network, Server, serving
from bench.stores import SPEC, random_rows
from cache.files.foreign import describe

NETWORKS = {
    "20 ms, 90 MB/s a connection": Network(0.020, 90e6),
    "20 ms, no limit": Network(0.020),
}
"""The first is as S3's own guidelines describe it: tens of milliseconds, and 85 to 90 MB/s."""
OF_PEER, OF_LOCAL = 2.0, 0.95
"""The goals: our first epoch beside a peer's, and later epochs beside those of a local store."""
LOCAL_ONLY = {
    "safetensors": "opens local paths only: a remote file is copied as a whole first",
    "grain": "its sources of records open local paths",
    "zarrs": "from an object store zarr-python does its work: 4 ms of a processor for each chunk",
}
"""Readers of `bench.read` that do not read from S3 by themselves, and why."""
LIBRARIES = (
    *("boto3", "s3fs", "obstore", "numpy", "torch", "litdata", "mosaicml-streaming"),
    *("webdataset", "pylance", "tensorstore", "embedding-reader"),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    rows: int
    rounds: int
    later_seconds: float
    """Seconds in which further epochs are started: in the first one, shards are still checked."""


FULL = Sizes(rows=8192, rounds=3, later_seconds=4.0)
QUICK = Sizes(rows=2048, rounds=1, later_seconds=0.1)

Runs = dict[str, dict[int, list[Run]]]
"""Of each reader with each number of worker processes, a run a round."""


def prepare(folder: Path, features: Rows) -> dict[str, str]:
    """Write the files of all readers; return of those that cannot why."""
    np.save(folder / "ends.npy", sorted_ends([features]))
    failed: dict[str, str] = {}
    for name, reader in READERS.items():
        written = folder / BUCKET / reader.files.partition("/")[0]
        if written.exists():
            continue
        written.mkdir(parents=True)
        try:
            reader.write(written, features)
        except PREPARE_ERRORS as error:
            failed[name] = describe(error)
    return failed


def measure_network(folder: Path, server: Server, sizes: Sizes, failed: dict[str, str]) -> Runs:
    """Let every reader read once a round; one that fails is added to `failed` and left out."""
    runs: Runs = {}
    for _ in range(sizes.rounds):
        for name, reader in READERS.items():
            for workers in reader.workers:
                label = f"{name}, {workers} workers" if workers else name
                if failed.keys() & {name, label}:
                    continue
                try:
                    run = run_reader(name, workers, folder, server, sizes.rows, sizes.later_seconds)
                except RuntimeError as error:
                    failed[label] = str(error)
                else:
                    runs.setdefault(name, {}).setdefault(workers, []).append(run)
    return runs


def summary(by_workers: dict[int, list[Run]]) -> dict[str, Any]:
    """Return the medians of a reader with the number of workers whose first epoch is faster."""
    workers, runs = max(by_workers.items(), key=lambda item: median_of(item[1], "first_rate"))
    later = [run.later_rate for run in runs if run.later_rate is not None]
    return {
        "workers": workers,
        "first_epoch": round(median_of(runs, "first_rate")),
        "first_epoch_runs": {
            str(number): [round(run.first_rate) for run in found]
            for number, found in by_workers.items()
        },
        "later_epochs": round(median(later)) if later else None,
        "later_epochs_runs": [round(rate) for rate in later],
        "client_cpu_seconds": round(median_of(runs, "client_cpu_seconds"), 2),
        "server_cpu_seconds": round(median_of(runs, "server_cpu_seconds"), 2),
        "requests": round(median_of(runs, "requests")),
        "bytes_served_per_byte": round(median_of(runs, "served"), 3),
    }


def median_of(runs: list[Run], field: str) -> float:
    """Return the median of a field of some runs."""
    return float(median(getattr(run, field) for run in runs))


def goals_of(network: str, runs: Runs) -> dict[str, Any]:
    """Return what was wanted on a network and what was found; medians of ratios within a round."""
    goals: dict[str, Any] = {}
    for name, local in LOCAL.items():
        if name in runs and local in runs:
            pairs = zip(runs[name][0], runs[local][0], strict=False)
            found = median((a.later_rate or 0) / (b.later_rate or 1) for a, b in pairs)
            goals[f"{network}: later epochs, {name} / local"] = at_least(OF_LOCAL, found)
    for peer in (LITDATA, STREAMING):
        if WINDOWED in runs and peer in runs:
            found = summary(runs[WINDOWED])["first_epoch"] / summary(runs[peer])["first_epoch"]
            goals[f"{network}: first epoch, {WINDOWED} / {peer}"] = at_least(OF_PEER, found)
    return goals


def print_network(network: str, summaries: dict[str, dict[str, Any]]) -> None:
    """Print a line for each reader."""
    print(f"\nremote, {network}: rows/s, and of the first epoch seconds of processors")
    print(f"  {'':<40} {'first':>7} {'later':>7} {'client':>7} {'server':>7} {'requests':>9}")
    for name, found in summaries.items():
        shown = f"{name}, {found['workers']} workers" if found["workers"] else name
        later = found["later_epochs"] or "-"
        cpu = f"{found['client_cpu_seconds']:>7.2f} {found['server_cpu_seconds']:>7.2f}"
        print(f"  {shown:<40} {found['first_epoch']:>7} {later:>7} {cpu} {found['requests']:>9}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    sizes = QUICK if arguments.quick else FULL
    failed: dict[str, str] = {}
    networks: dict[str, Any] = {}
    goals: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        failed |= prepare(folder, random_rows(np.random.default_rng(0), sizes.rows))
        for network in [*NETWORKS][:1] if arguments.quick else NETWORKS:
            with serving(folder / BUCKET, NETWORKS[network]) as server:
                runs = measure_network(folder, server, sizes, failed)
            networks[network] = {reader: summary(found) for reader, found in runs.items()}
            goals |= goals_of(network, runs)
            print_network(network, networks[network])
    for reader, reason in (failed | LOCAL_ONLY).items():
        print(f"  {reader:<40} not measured: {reason}")
    print_goals(goals)
    setting = asdict(sizes) | {"patches": SPEC.patches, "width": SPEC.width, "batch": BATCH}
    return {
        "unit": "rows/s",
        "setting": setting,
        "networks": networks,
        "not_measured": failed | LOCAL_ONLY,
        "goals": goals,
    }


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "remote",
        measure,
        benchmark_parser(__doc__),
        minutes=12,
        quick_seconds=60,
        libraries=LIBRARIES,
    )


if __name__ == "__main__":
    main()
