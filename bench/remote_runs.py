"""Runs a reader of an S3 server in a process of its own, and checks every row that it gives.

The process is forked by a server of processes (`forkserver`) that has imported this module and
nothing of any reader: no reader finds the threads, settings or connections of another.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray

from bench.readers.contender import PREPARE_ERRORS, Batch
from bench.remote_readers import READERS, Source
from bench.s3_server import BUCKET, Server
from bench.stores import SPEC
from cache.files.foreign import describe

END_VALUES = 8
"""At each end of a row, to tell it from the others."""
RUN_SECONDS = 150.0
"""How long a reader may take."""
END_SECONDS = 5.0
"""How long its process may take to end."""
PROCESSES = multiprocessing.get_context("forkserver")
ROW_BYTES = SPEC.patches * SPEC.width * 2


@dataclass(frozen=True)
class Run:
    """What one reader did in one process."""

    first_rate: float
    """Rows a second of the first epoch."""
    later_rate: float | None
    """Of the median later epoch; None for a reader that keeps nothing."""
    client_cpu_seconds: float
    """Of the first epoch, with the worker processes."""
    server_cpu_seconds: float
    requests: int
    served: float
    """Bytes of the server's answers, beside those of the features."""


@dataclass(frozen=True)
class Task:
    """What a process is to read."""

    name: str
    """Of the reader."""
    workers: int
    source: Source
    later_seconds: float
    """Seconds in which further epochs are started."""
    environment: dict[str, str]
    ends: Path
    """File of `sorted_ends` of all rows."""


def sorted_ends(batches: Iterable[Batch]) -> NDArray[np.void]:
    """Read all batches and return the first and last values of each row, sorted."""
    ends = []
    for batch in batches:
        rows = np.asarray(batch)
        found = np.concatenate((rows[:, 0, :END_VALUES], rows[:, -1, -END_VALUES:]), axis=1)
        # Of embedding-reader as float32.
        ends.append(found.astype(np.float16).tobytes())
    return np.sort(np.frombuffer(b"".join(ends), f"V{4 * END_VALUES}"))


def run_reader(
    name: str, workers: int, folder: Path, server: Server, rows: int, later_seconds: float
) -> Run:
    """Read everything in a new process whose local folder is empty.

    Args:
        name: Of the reader.
        workers: Its worker processes.
        folder: Holds the served folder `BUCKET`, and `ends.npy` from `sorted_ends`.
        server: Serves the former.
        rows: Number of rows.
        later_seconds: Seconds in which further epochs are started.

    Raises:
        RuntimeError: The reader fails, takes too long, or gives other rows than were written.
    """
    reader = READERS[name]
    files = folder / BUCKET / reader.files
    cache = folder / "local"
    cache.mkdir()
    url = str(files) if reader.is_local else f"s3://{BUCKET}/{reader.files}"
    names = tuple(sorted(path.name for path in files.iterdir()))
    environment = server.environment | {
        # MosaicML's own, ours, and that of whoever asks for a temporary folder.
        "S3_ENDPOINT_URL": server.url,
        "PATCHCACHE_CACHE_DIR": str(cache),
        "TMPDIR": str(cache),
    }
    source = Source(url, server.url, names, cache, rows)
    task = Task(name, workers, source, later_seconds, environment, folder / "ends.npy")
    try:
        return _run(task, server)
    finally:
        shutil.rmtree(cache)


def _run(task: Task, server: Server) -> Run:
    PROCESSES.set_forkserver_preload([__name__])
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_read, args=(task, theirs))
    process.start()
    assert process.pid is not None
    theirs.close()
    try:
        _receive(ours)
        before = server.served()
        ours.send(None)
        first_rate, cpu_seconds = _receive(ours)
        after = server.served()
        ours.send(None)
        return Run(
            first_rate=first_rate,
            later_rate=_receive(ours),
            client_cpu_seconds=cpu_seconds,
            server_cpu_seconds=after.cpu_seconds - before.cpu_seconds,
            requests=after.requests - before.requests,
            served=(after.body_bytes - before.body_bytes) / (task.source.rows * ROW_BYTES),
        )
    finally:
        process.join(END_SECONDS)
        # What is left of it or of its workers; it leads a group of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(RUN_SECONDS):
        raise RuntimeError(f"not done after {RUN_SECONDS:.0f} s")
    try:
        answer = pipe.recv()
    except EOFError:
        answer = "its process ended without an answer"
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def _read(task: Task, pipe: Connection) -> None:
    """Send a message before the first epoch, after it, and after the later ones; or an error."""
    os.setpgid(0, 0)
    log = os.open(task.source.cache.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ.update(task.environment)
    # Torch's workers are to be forked, as they are by default.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    try:
        _read_epochs(task, pipe)
    except PREPARE_ERRORS as error:
        pipe.send(describe(error))


def _read_epochs(task: Task, pipe: Connection) -> None:
    reader = READERS[task.name]
    import_module(reader.library)
    expected = np.load(task.ends)
    pipe.send(None)
    pipe.recv()
    cpu, started = _cpu_seconds(), time.perf_counter()
    epoch = reader.open(task.source, task.workers)
    ends = sorted_ends(epoch(0))
    seconds = time.perf_counter() - started
    cpu = _cpu_seconds() - cpu
    _check(ends, expected)
    pipe.send((len(ends) / seconds, cpu))
    pipe.recv()
    later: list[float] = []
    started = time.perf_counter()
    while reader.keeps and (not later or time.perf_counter() - started < task.later_seconds):
        begun = time.perf_counter()
        ends = sorted_ends(epoch(len(later) + 1))
        later.append(len(ends) / (time.perf_counter() - begun))
        _check(ends, expected)
    pipe.send(statistics.median(later) if later else None)


def _check(ends: NDArray[np.void], expected: NDArray[np.void]) -> None:
    if len(ends) != len(expected) or not np.array_equal(ends, expected):
        known = np.isin(ends, expected).sum()
        raise ValueError(f"{len(ends)} rows came, {known} of them right; wanted {len(expected)}")


def _cpu_seconds() -> float:
    """Return the processor time of this process and its children, ended ones too."""
    this = psutil.Process()
    return sum(sum(p.cpu_times()[:4]) for p in (this, *this.children(recursive=True)))
