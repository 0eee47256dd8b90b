"""Worker processes that compute results ahead of their consumer.

Each worker has a socket pair of its own. Shared memory is avoided, because Docker gives 64 MB of
it, and so are locks between workers, because a killed worker would hold one for ever.
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

PARENT_POLL_SECONDS = 0.2
"""How often a process checks that its parent is alive."""

JOIN_SECONDS = 5.0
"""How long to wait for a killed process: one that hangs on a dead disk never ends."""


class WorkerPool(Generic[Result]):
    """Processes that all run one function, from the beginning of a `with` block to its end."""

    def __init__(self, function: Callable[[int], Result], num_workers: int) -> None:
        """Prepare the processes.

        Args:
            function: Computes the result of a number. A PatchcacheError or an OSError that it
                raises is raised in this process too.
            num_workers: Number of processes; 0 runs the function in this process.
        """
        self._function = function
        self._workers = [_Worker(function) for _ in range(num_workers)]
        self._idle = deque(self._workers)
        # Each thread waits for one process.
        self._threads = ThreadPoolExecutor(max(1, num_workers))

    def __enter__(self) -> Self:
        try:
            for worker in self._workers:
                worker.start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def results(self, numbers: Iterable[int], prefetch: int) -> Iterator[Result]:
        """Yield the result of each number, in order.

        Args:
            numbers: Advanced only when the next number is about to be handed to a worker.
            prefetch: Results that each process may compute ahead of the consumer.

        Raises:
            StageError: A process died.
        """
        if not self._workers:
            yield from map(self._function, numbers)
            return
        remaining = iter(numbers)
        pending: deque[Future[Result]] = deque()

        def submit(count: int) -> None:
            for number in itertools.islice(remaining, count):
                pending.append(self._threads.submit(self._call, number))

        submit(prefetch * len(self._workers))
        while pending:
            result = pending.popleft().result()
            submit(1)
            yield result

    def _call(self, number: int) -> Result:
        worker = self._idle.popleft()
        try:
            return worker.call(number)
        finally:
            self._idle.append(worker)

    def _end(self) -> None:
        # An interrupt midway would leave a process behind.
        with without_interrupts():
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()


class _Worker(Generic[Result]):
    """One process and the sockets between it and this one."""

    def __init__(self, function: Callable[[int], Result]) -> None:
        self._function = function
        self._process: ForkProcess | None = None

    def start(self) -> None:
        # Created just before the fork: a process started earlier must not inherit the child's end,
        # or the pipe would stay open after the child's death.
        parent_end, child_end = socket.socketpair()
        self._pipe = parent_end.makefile("rwb")
        # A fork, so that the function need not be pickled.
        arguments = (self._function, parent_end, child_end)
        process = FORK.Process(target=_serve, args=arguments, daemon=True)
        with parent_end, child_end, without_interrupts():
            self._process = process
            process.start()

    def call(self, number: int) -> Result:
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
        self._process.join(JOIN_SECONDS)
        code = self._process.exitcode
        how = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        return StageError(
            f"extract: a decoding process died ({how}). Finished shards are kept; lower "
            f"extract.workers if memory ran out, and run again."
        )

    def close(self) -> None:
        """Close the pipe, once no thread waits for it."""
        if self._process:
            # Data for a dead process cannot be written.
            with contextlib.suppress(OSError):
                self._pipe.close()

    def kill(self) -> None:
        if self._process and self._process.ident:
            self._process.kill()
            self._process.join(JOIN_SECONDS)


def _serve(
    function: Callable[[int], object], parent_end: socket.socket, child_end: socket.socket
) -> None:
    """Answer numbers with results until the parent closes the pipe."""
    parent_end.close()
    threading.Thread(target=exit_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError), child_end.makefile("rwb") as pipe:
        while True:
            number = pickle.load(pipe)
            try:
                answer = function(number)
            except (PatchcacheError, OSError) as error:
                answer = error
            # Protocol 5 writes an array without copying it.
            pickle.dump(answer, pipe, protocol=5)
            pipe.flush()


def exit_with_parent() -> None:
    """End this process once its parent was killed, so that the next run has the folder alone."""
    parent = multiprocessing.parent_process()
    while parent and os.getppid() == parent.pid:
        time.sleep(PARENT_POLL_SECONDS)
    os._exit(1)
