"""How a command is interrupted, and how the processes that it starts are left out of it.

Ctrl-C, `timeout`, a batch system and `docker stop` send their signal to all processes of a command
at once. The first process heeds it and ends the others; those never see it.
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to stop."""

INTERRUPTED = 130
"""Exit code of a command stopped by Ctrl-C, SIGTERM or SIGHUP, as shells use it."""

REPEAT_SECONDS = 1.0
"""After which a request to stop is made once more, as long as nobody heeds it."""

AGAIN = "interrupted; run the same command again"
"""What such a command says."""


def heed_interrupts(heed: Callable[[int, FrameType | None], NoReturn] | None = None) -> None:
    """Let the first signal that asks to stop raise KeyboardInterrupt, and all later ones nothing.

    Those that the caller ignores stay ignored, as `nohup` and a shell's background jobs want it;
    but for SIGTERM, which nobody sends by accident.

    Args:
        heed: Handler that is installed in place of the one that raises KeyboardInterrupt.
    """
    for number in INTERRUPTS:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, heed or _interrupt)


def ignore_interrupts() -> None:
    """Let no signal cut off what is left to do on the way out."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes that begin in the block never see a signal that asks to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # `timeout` sends its signal to the process, and then to the group.
    ignore_interrupts()
    signal.signal(signal.SIGALRM, _interrupt_again)
    signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS, REPEAT_SECONDS)
    raise KeyboardInterrupt


def _interrupt_again(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt if the last one was dropped.

    Libraries in C do that where they clear an error that they did not expect: pyarrow, while it
    imports pandas. Clean-up that the first one caused is left in peace.
    """
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return
        error = error.__context__
    raise KeyboardInterrupt
