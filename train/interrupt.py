"""Ctrl-C and SIGTERM while a run goes on: it stops where its state can be saved."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType


class StopRequest:
    """Handles both signals inside a `with`, which must be entered by the main thread.

    The first signal is remembered, the second one raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.asked = False
        """Whether a signal has come."""
        self._at_once = False

    def __enter__(self) -> "StopRequest":
        signals = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._handle) for number in signals}
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
        if self.asked or self._at_once:
            self.asked = True
            raise KeyboardInterrupt
        self.asked = True
        name = signal.Signals(number).name
        print(f"\n{name}: stopping after this step; again to stop at once", file=sys.stderr)
