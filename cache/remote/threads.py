"""Threads that wait for servers, and a queue in which urgent requests overtake others.

Threads of `concurrent.futures` are joined when the interpreter exits, which would wait for every
queued request. These are daemons, and a forked child starts its own.
"""

import itertools
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

NUM_THREADS = 16
"""Requests at once. At 20 ms a request and 8 MB each, 16 of them fill a line of 50 Gbit/s; rows of
75 KB come at 800 a second."""

NOW, SOON, LATER = range(3)
"""Urgency: a gather waits; rows that the order needs next; whole shards."""


class Threads:
    """Runs functions in daemon threads, the most urgent first, then in order."""

    def __init__(self) -> None:
        """Start the threads."""
        self._numbers = itertools.count()
        self._queue: queue.PriorityQueue[tuple[int, int, Callable[[], None]]]
        self._queue = queue.PriorityQueue()
        for number in range(NUM_THREADS):
            threading.Thread(target=self._work, name=f"remote-{number}", daemon=True).start()

    def submit(self, urgency: int, function: Callable[..., object], *arguments: Any) -> Future[Any]:
        """Queue a call; its result, or its exception, is that of the future."""
        future: Future[Any] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        self._queue.put((urgency, next(self._numbers), call))
        return future

    def _work(self) -> None:
        while True:
            _, _, call = self._queue.get()
            call()
            # What it refers to must not live until the next call comes.
            del call


_of_process: dict[int, Threads] = {}

_starting = threading.Lock()


def threads() -> Threads:
    """Return the threads of this process."""
    process = os.getpid()
    if process not in _of_process:
        with _starting:
            if process not in _of_process:
                _of_process[process] = Threads()
    return _of_process[process]


def _after_fork() -> None:
    global _starting
    _starting = threading.Lock()
    _of_process.clear()


os.register_at_fork(after_in_child=_after_fork)
