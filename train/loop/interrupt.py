"""Ctrl-C, SIGTERM and SIGHUP while a run goes on: it stops where its state can be saved."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from cache.cli.interrupts import INTERRUPTS

REPEAT_SECONDS = 0.2
"""A signal so soon after the first one is the same request: `timeout` sends its signal to the
process, and then to the group."""


class StopRequest:
    """Handles the signals inside a `with`, which must be entered by the main thread.

    The first signal is remembered, the second one raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether a signal has come."""
        self._asked_at = 0.0
        self._at_once = False

    def __enter__(self) -> "StopRequest":
        # `nohup` ignores SIGHUP, so that a run outlives its terminal.
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in INTERRUPTS if not (nohup and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the first signal raise KeyboardInterrupt too: the caller knows how to save."""
        self._at_once = True
        try:
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and time.monotonic() < self._asked_at + REPEAT_SECONDS:
            return
        if self.asked or self._at_once:
            self.asked = True
            raise KeyboardInterrupt
        self.asked, self._asked_at = True, time.monotonic()
        name = signal.Signals(number).name
        print(f"\n{name}: stopping after this step; again to stop at once", file=sys.stderr)
