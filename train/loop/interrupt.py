"""Handles Ctrl-C, SIGTERM and SIGHUP: a run stops where its state can be saved."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType, TracebackType

from cache.cli.interrupts import INTERRUPTS

REPEAT_SECONDS = 0.2
"""A second signal this soon counts as the same request: `timeout` signals the process, then its
group."""


class StopRequest:
    """Handles the signals inside a `with` block of the main thread.

    The first signal is remembered, the second raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.requested = False
        """Whether a signal was received."""
        self._requested_at = 0.0
        self._at_once = False

    def __enter__(self) -> "StopRequest":
        # Under `nohup` SIGHUP is ignored, so that a run outlives its terminal.
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in INTERRUPTS if not (nohup and number == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let the first signal raise KeyboardInterrupt too, for a caller that saves the state."""
        self._at_once = True
        try:
            if self.requested:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() < self._requested_at + REPEAT_SECONDS:
            return
        if self.requested or self._at_once:
            self.requested = True
            raise KeyboardInterrupt
        self.requested, self._requested_at = True, time.monotonic()
        name = signal.Signals(number).name
        print(f"\n{name}: stopping after this step; again to stop at once", file=sys.stderr)
