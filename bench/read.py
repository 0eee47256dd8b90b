"""How fast random batches of features are read, beside what one would do otherwise.

    python -m bench.read

A store of more than a gigabyte, 64 random rows a batch. The limit is an array in memory that
numpy gathers from, in one thread. `gather` copies into a buffer that is used again;
`FeatureBatches` is what training uses. The peers are complete loaders into torch (`bench.peers`).

Each contender works in a process of its own, one at a time. Cold: its files are dropped from this
system's page cache before every run (posix_fadvise after an fsync; mincore then says that they
are gone), and its process is a new one. Opening it and starting its workers count, and so does
what the system reads ahead, often megabytes at a touch. A run ends when all rows were read once, at
the latest. Warm: the files are in the page cache, and each contender goes on where it stopped the
round before; batches that were made ahead of a run are not timed.
"""

import argparse
import contextlib
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench import pages
from bench.command import benchmark_parser, run_benchmark
from bench.measure import at_least, interleaved, medians, print_goals, print_table, summary
from bench.peers import PEERS
from bench.readers.contender import (
    BATCH,
    FORK,
    PREPARE_ERRORS,
    Batch,
    Contender,
    end,
    forever,
)
from bench.stores import SPEC, make_store, random_rows
from cache import FeatureStore
from cache.files.foreign import describe
from train.data.order import global_order
from train.data.prefetch import FeatureBatches

ROWS, QUICK_ROWS = 16384, 1024
WARM_ROUNDS, COLD_ROUNDS = 5, 3
WARM_SECONDS, COLD_SECONDS = 0.6, 1.5
"""How long batches are read in a run; a cold run ends when all rows were read, too."""
SKIPPED = 32
"""Batches at the start of a warm run that are not timed: more than any loader makes ahead."""
CPU = torch.device("cpu")

GATHER, SOURCE, LIMIT = "FeatureStore.gather", "FeatureBatches", "array in memory, np.take"
OF_LIMIT, OF_PEER = 0.9, 8.0
"""The goals: gather beside the limit, FeatureBatches beside the fastest peer."""

LIBRARIES = (
    *("h5py", "numpy", "pyarrow", "torch"),
    *("datasets", "litdata", "mosaicml-streaming", "webdataset", "embedding-reader", "pylance"),
    *("safetensors", "zarr", "zarrs", "tensorstore", "grain", "array-record"),
)


def epochs(rows: int) -> Iterator[list[NDArray[np.int64]]]:
    """Give the batches of one epoch after the other, all rows in another order in each."""
    epoch = 0
    while True:
        order = global_order(rows, 0, epoch)[: rows - rows % BATCH]
        yield list(order.reshape(-1, BATCH))
        epoch += 1


def our_contenders(folder: Path, features: NDArray[np.float16]) -> dict[str, Contender]:
    """Write a store; return its readers, and the array in memory as the limit."""
    root = make_store(folder, len(features), lambda image_ids: features[image_ids])
    out = np.empty((BATCH, *features.shape[1:]), np.float16)

    def gather() -> Iterator[Batch]:
        store = FeatureStore(root)
        return (store.gather(ids, out) for batches in epochs(len(store)) for ids in batches)

    def source() -> Iterator[Batch]:
        store, orders = FeatureStore(root), epochs(len(features))
        return forever(lambda: FeatureBatches(store, next(orders), CPU))

    def limit() -> Iterator[Batch]:
        # With another mode numpy gathers into a buffer first.
        take = np.take
        return (
            take(features, ids, axis=0, out=out, mode="clip")
            for batches in epochs(len(features))
            for ids in batches
        )

    return {
        GATHER: Contender(gather, folder, is_loader=False),
        SOURCE: Contender(source, folder, is_loader=False),
        LIMIT: Contender(limit, None, is_loader=False),
    }


def prepare(
    folder: Path, features: NDArray[np.float16]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Let every contender write its files and read one batch.

    Returns:
        The contenders, ours first, and of each peer that cannot run here why.
    """
    (folder / "ours").mkdir()
    found = our_contenders(folder / "ours", features)
    failed: dict[str, str] = {}
    for peer, make in PEERS.items():
        (folder / peer).mkdir()
        try:
            made = make(folder / peer, features)
        except PREPARE_ERRORS as error:
            failed[peer] = describe(error)
            continue
        for name, contender in made.items():
            try:
                with Reader(contender):
                    found[name] = contender
            except RuntimeError as error:
                failed[name] = str(error)
    pages.sync(folder)
    return found, failed


class Reader:
    """A contender at work in a forked process.

    In its own, so that no contender's threads, settings or mappings are there when another one is
    measured: pages that a process has mapped are not dropped. Idle while it is not asked.
    """

    def __init__(self, contender: Contender, most_batches: int = 1) -> None:
        """Start it and let it read so many batches, or fewer; see `from_start`.

        Raises:
            RuntimeError: It cannot.
        """
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(target=answer, args=(contender, most_batches, theirs))
        self._process.start()
        theirs.close()
        self.first_rate = float(self._receive())
        """Rows a second from its start on."""

    def rate(self) -> float:
        """Read on; see `rate`."""
        self._pipe.send(True)
        return float(self._receive())

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        # Said, because closing the pipe is not noticed: later processes inherited its end.
        with contextlib.suppress(OSError):
            self._pipe.send(False)
        self._pipe.close()
        end(self._process)

    def _receive(self) -> Any:
        try:
            answered = self._pipe.recv()
        except EOFError:
            answered = "its process ended without an answer"
        if isinstance(answered, str):
            self.__exit__()
            raise RuntimeError(answered)
        return answered


def answer(contender: Contender, most_batches: int, pipe: Connection) -> None:
    """Start to read, then read as often as the pipe asks; send rates, or an error as a text."""
    try:
        stream, first_rate = from_start(contender, most_batches)
        pipe.send(first_rate)
        while pipe.recv():
            pipe.send(rate(stream))
    except PREPARE_ERRORS as error:
        pipe.send(describe(error))


def from_start(contender: Contender, most_batches: int) -> tuple[Iterator[Batch], float]:
    """Open a contender and read; return its batches to come, and rows a second since opening."""
    started, batches = time.perf_counter(), 0
    stream = contender.open()
    while batches < most_batches and time.perf_counter() - started < COLD_SECONDS:
        batch = next(stream)
        batches += 1
        if batches == 1:
            check_batch(batch)
    return stream, batches * BATCH / (time.perf_counter() - started)


def check_batch(batch: Batch) -> None:
    """Refuse a batch that is not 64 different rows of features."""
    found = np.asarray(batch)
    different = len({row.tobytes() for row in found[:, 0, :8]})
    shape = (BATCH, SPEC.patches, SPEC.width)
    is_float = found.dtype in (np.float16, np.float32)
    if not is_float or found.shape != shape or different != BATCH:
        raise ValueError(f"a batch is {found.dtype} {found.shape} of {different} rows")


def rate(stream: Iterator[Batch]) -> float:
    """Read on and return rows a second, after the batches that were made ahead."""
    for _ in range(SKIPPED):
        next(stream)
    started, batches = time.perf_counter(), 0
    while (seconds := time.perf_counter() - started) < WARM_SECONDS:
        next(stream)
        batches += 1
    return batches * BATCH / seconds


def measure_warm(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Return the rates of rounds in which all files are in the page cache."""
    for folder in {c.folder for c in contenders.values() if c.folder}:
        pages.warm(folder)
    with contextlib.ExitStack() as stack:
        readers = {name: stack.enter_context(Reader(c)) for name, c in contenders.items()}
        return interleaved({name: reader.rate for name, reader in readers.items()}, rounds)


def measure_cold(
    contenders: dict[str, Contender], rows: int, rounds: int
) -> dict[str, list[float]]:
    """Return the rates of rounds before each of whose runs the files are dropped."""
    on_disk = {name: partial(cold_rate, c, rows) for name, c in contenders.items() if c.folder}
    return interleaved(on_disk, rounds, uncounted=0)


def cold_rate(contender: Contender, rows: int) -> float:
    """Drop the files, open the contender anew, read at most all rows."""
    assert contender.folder is not None
    pages.drop(contender.folder)
    with Reader(contender, rows // BATCH) as reader:
        return reader.first_rate


def compared(median: dict[str, float], contenders: dict[str, Contender]) -> dict[str, Any]:
    """Say how many times as fast as each complete loader our batches come."""
    loaders = [name for name in median if contenders[name].is_loader]
    return {name: round(median[SOURCE] / median[name], 2) for name in loaders}


def goals_of(warm: dict[str, float], contenders: dict[str, Contender]) -> dict[str, Any]:
    """Return what was wanted of the warm rates and what was found."""
    loaders = [name for name in warm if contenders[name].is_loader]
    documented = [name for name in loaders if contenders[name].is_documented]
    goals = {f"{GATHER} / {LIMIT}": at_least(OF_LIMIT, warm[GATHER] / warm[LIMIT])}
    for kind, names in {"fastest peer": loaders, "fastest documented peer": documented}.items():
        if names:
            best = max(names, key=warm.__getitem__)
            goals[f"{SOURCE} / {kind} ({best})"] = at_least(OF_PEER, warm[SOURCE] / warm[best])
    return goals


def compare_readers(folder: Path, rows: int, rounds: dict[str, int]) -> dict[str, Any]:
    """Prepare, measure warm, measure cold; return what the result file says of it and print it."""
    features = random_rows(np.random.default_rng(0), rows)
    contenders, failed = prepare(folder, features)
    runs = {
        "cold": measure_cold(contenders, rows, rounds["cold"]),
        "warm": measure_warm(contenders, rounds["warm"]),
    }
    goals = goals_of(medians(runs["warm"]), contenders)
    for name, rates in runs.items():
        print_table(f"read, {name}", "rows", medians(rates))
    for name, reason in failed.items():
        print(f"  {name:<44} cannot run here: {reason}")
    print_goals(goals)
    return {
        name: {
            **summary(rates, digits=0),
            "FeatureBatches is so many times as fast": compared(medians(rates), contenders),
        }
        for name, rates in runs.items()
    } | {"cannot_run_here": failed, "goals": goals}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; return what the result file says."""
    torch.set_num_threads(1)
    # Several peers hand out what they mapped or read; nobody writes into it.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    # A process uses Lance after its fork only.
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    warnings.filterwarnings("ignore", message="with_row_id is not supported")
    rows = QUICK_ROWS if arguments.quick else ROWS
    rounds = {"warm": WARM_ROUNDS, "cold": COLD_ROUNDS}
    if arguments.quick:
        rounds = dict.fromkeys(rounds, 1)
    setting = {"rows": rows, "patches": SPEC.patches, "width": SPEC.width, "batch": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        found = compare_readers(Path(folder), rows, rounds)
    return {"unit": "rows/s", "setting": setting, "rounds": rounds, **found}


def main() -> None:
    """Measure and write the result file."""
    run_benchmark(
        "read",
        measure,
        benchmark_parser(__doc__),
        minutes=11,
        quick_seconds=90,
        libraries=LIBRARIES,
    )


if __name__ == "__main__":
    main()
