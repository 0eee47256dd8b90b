"""Threads that wait for servers, and a queue in which urgent requests overtake others.

Threads of `concurrent.futures` are joined when the interpreter exits, which would wait for every
queued request. These are daemons, and a forked child starts its own.
"""

import atexit
import contextlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

ROW_THREADS = 32
"""Requests for rows at once: at 20 ms each, rows of 75 KB come at 120 MB a second."""

SHARD_THREADS = 12
"""Requests for parts of whole shards at once: S3's guidelines give a connection 85 to 90 MB a
second, which makes 1 GB a second. With 32, two cores were slower (docs/design-notes.md)."""

GATHER, PREFETCH, GATHER_SHARD, WHOLE_SHARD, CHECK = range(5)
"""Urgency: a gather waits; rows that the order needs next; a gather waits for a part of a whole
shard; whole shards; the sha256 of a shard with all its rows, for which nothing waits: it begins
when no request is queued or running."""


class PriorityThreads:
    """Runs functions in daemon threads, the most urgent first, then in order."""

    def __init__(self, num_threads: int, after: Sequence["PriorityThreads"] = ()) -> None:
        """Start the threads; they begin nothing while those of `after` have work."""
        self._after = after
        self._numbers = itertools.count()
        self._queue: queue.PriorityQueue[tuple[int, int, Callable[[], None]]]
        self._queue = queue.PriorityQueue()
        for _ in range(num_threads):
            threading.Thread(target=self._work, name="patchcache-remote", daemon=True).start()

    def submit(self, urgency: int, function: Callable[..., object], *arguments: Any) -> Future[Any]:
        """Queue a call; its result, or its exception, is that of the future."""
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._queue.put((urgency, next(self._numbers), call))
        return future

    def _work(self) -> None:
        while True:
            _, _, call = self._queue.get()
            for others in self._after:
                others._queue.join()
            call()
            self._queue.task_done()
            # Release the closure now, not when the next call arrives.
            del call


_of_process: dict[int, PriorityThreads] = {}
"""The threads for each urgency."""

_starting = threading.Lock()


def submit(urgency: int, function: Callable[..., object], *arguments: Any) -> Future[Any]:
    """Run a function in a thread of this process; see `PriorityThreads.submit`."""
    with _starting:
        if not _of_process:
            rows, shards = PriorityThreads(ROW_THREADS), PriorityThreads(SHARD_THREADS)
            checks = PriorityThreads(1, after=(rows, shards))
            _of_process.update({GATHER: rows, PREFETCH: rows})
            _of_process.update({GATHER_SHARD: shards, WHOLE_SHARD: shards, CHECK: checks})
    return _of_process[urgency].submit(urgency, function, *arguments)


class ExitError(Exception):
    """The interpreter ends: a thread must not begin what cannot be stopped halfway."""


_exiting = threading.Event()

_uninterrupted = threading.Lock()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the interpreter wait for the end of the block before it ends.

    A daemon thread stops wherever it is, with what it holds. In HDF5 that is h5py's lock, for which
    the main thread, which closes h5py's objects, would then wait for ever.

    Raises:
        ExitError: The interpreter ends, and this is not its main thread.
    """
    with _uninterrupted:
        if _exiting.is_set() and threading.current_thread() is not threading.main_thread():
            raise ExitError
        yield


@atexit.register
def _exit() -> None:
    _exiting.set()
    with _uninterrupted:
        pass


def _after_fork() -> None:
    global _starting, _uninterrupted
    _starting, _uninterrupted = threading.Lock(), threading.Lock()
    _of_process.clear()


os.register_at_fork(after_in_child=_after_fork)
