"""Worker processes that do some work ahead of whoever takes its results.

Each worker has one pair of sockets to itself. There is no shared memory, which Docker gives 64 MB,
and no lock between the workers, which one that is killed would hold for ever.
"""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.context import ForkProcess
from typing import Generic, Self, TypeVar

from cache.cli.interrupts import without_interrupts
from cache.errors import PatchcacheError
from workspace.errors import StageError

Result = TypeVar("Result")

FORK = multiprocessing.get_context("fork")

LOOK_SECONDS = 0.2
"""How often a process looks whether the one that started it still runs."""

END_SECONDS = 5.0
"""How long a killed process is waited for: one that waits for a dead disk cannot end."""


class Workers(Generic[Result]):
    """Some processes that all do the same work; they end with the block of a `with` statement."""

    def __init__(self, work: Callable[[int], Result], num_workers: int) -> None:
        """Start the processes.

        Args:
            work: What is done with a number. Its PatchcacheError or OSError is raised
                here too.
            num_workers: How many processes; with 0 the work is done here.
        """
        self._work = work
        self._workers = [_Worker(work) for _ in range(num_workers)]
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self._end()
            raise
        self._idle = deque(self._workers)
        # One thread waits for each process.
        self._threads = ThreadPoolExecutor(max(1, num_workers))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._threads.shutdown(cancel_futures=True)

    def results(self, numbers: Iterable[int], ahead: int) -> Iterator[Result]:
        """Yield the result of each number, in order.

        Args:
            numbers: Asked for the next one when that is about to be worked on.
            ahead: How many results each process may be ahead of the one that is taken.

        Raises:
            StageError: A process died.
        """
        if not self._workers:
            yield from map(self._work, numbers)
            return
        remaining = iter(numbers)
        begun: deque[Future[Result]] = deque()

        def begin(count: int) -> None:
            for number in itertools.islice(remaining, count):
                begun.append(self._threads.submit(self._ask, number))

        begin(ahead * len(self._workers))
        while begun:
            result = begun.popleft().result()
            begin(1)
            yield result

    def _ask(self, number: int) -> Result:
        worker = self._idle.popleft()
        try:
            return worker.ask(number)
        finally:
            self._idle.append(worker)

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()


class _Worker(Generic[Result]):
    """One process and the sockets between it and this one."""

    def __init__(self, work: Callable[[int], Result]) -> None:
        self._work = work
        self._process: ForkProcess | None = None

    def start(self) -> None:
        # Made here: of the end of a process, an earlier one must not inherit a copy, with which
        # the death of the process would not close it.
        here, there = socket.socketpair()
        self._pipe = here.makefile("rwb")
        # A fork has the work without that it is sent.
        process = FORK.Process(target=_serve, args=(self._work, here, there), daemon=True)
        with here, there, without_interrupts():
            self._process = process
            process.start()

    def ask(self, number: int) -> Result:
        try:
            pickle.dump(number, self._pipe)
            self._pipe.flush()
            answer: Result | PatchcacheError | OSError = pickle.load(self._pipe)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise self._death() from None
        if isinstance(answer, PatchcacheError | OSError):
            raise answer
        return answer

    def _death(self) -> StageError:
        assert self._process
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        return StageError(
            f"extract: a decoding process died ({how}). Finished shards are kept; lower "
            f"extract.workers if memory ran out, and run again."
        )

    def end(self) -> None:
        if self._process and self._process.ident:
            self._process.kill()
            self._process.join(END_SECONDS)


def _serve(work: Callable[[int], object], here: socket.socket, there: socket.socket) -> None:
    """Do work until the other process has no more; what it hears then is the end of the pipe."""
    here.close()
    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError), there.makefile("rwb") as pipe:
        while True:
            number = pickle.load(pipe)
            try:
                answer = work(number)
            except (PatchcacheError, OSError) as error:
                answer = error
            # Protocol 5 writes an array without a copy of it.
            pickle.dump(answer, pipe, protocol=5)
            pipe.flush()


def end_with_parent() -> None:
    """End this process once its parent was killed, so that the next run has the folder alone."""
    parent = multiprocessing.parent_process()
    while parent and os.getppid() == parent.pid:
        time.sleep(LOOK_SECONDS)
    os._exit(1)
