"""Interruption of a command, by Ctrl-C or a signal.

Ctrl-C, `timeout`, a batch system and `docker stop` send their signal to all processes of a command
at once. Only the first process handles it, and ends the others.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to stop."""

INTERRUPTED = 130
"""Exit code of a command stopped by Ctrl-C, SIGTERM or SIGHUP; shells use it for Ctrl-C."""

REPEAT_SECONDS = 1.0
"""Seconds after which an interruption that a library has dropped is raised again."""

INTERRUPTED_MESSAGE = "interrupted; run the same command again"
"""Message of an interrupted command."""


def handle_interrupts(handler: Callable[[int, FrameType | None], NoReturn] | None = None) -> None:
    """Let the first signal of INTERRUPTS raise KeyboardInterrupt, and ignore later ones.

    Signals that the caller ignores stay ignored, for `nohup` and a shell's background jobs; except
    SIGTERM, which is never sent by accident.

    Args:
        handler: Handler to install in place of the one that raises KeyboardInterrupt.
    """
    for number in INTERRUPTS:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler or _interrupt)
    if not handler and sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _report_unraisable


def ignore_interrupts() -> None:
    """Ignore further signals, so that none cuts off the clean-up."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Hold INTERRUPTS back until the block ends, and block them in processes that start within it.

    They are raised as the block ends: a `try` that ends these processes holds the block too.
    """
    held: list[int] = []
    handlers = {}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        # The system gives a signal that this thread blocks to another one, such as tqdm's, and
        # Python runs the handler in the main thread all the same.
        if threading.current_thread() is threading.main_thread():
            for number in INTERRUPTS:
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in held:
            signal.raise_signal(late)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # `timeout` sends its signal twice: to the process, then to the group.
    ignore_interrupts()
    signal.signal(signal.SIGALRM, _interrupt_again)
    signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS, REPEAT_SECONDS)
    raise KeyboardInterrupt


def _report_unraisable(error: "sys.UnraisableHookArgs") -> None:
    """Stay silent about an interruption of a destructor or a fork hook; it is raised again."""
    if not issubclass(error.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(error)


def _interrupt_again(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt again if a library has dropped it.

    Libraries in C clear errors that they do not expect, such as pyarrow while it imports pandas.
    Nothing is raised while the first interruption is being handled.
    """
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return
        error = error.__context__
    raise KeyboardInterrupt
