"""The frame around every stage's entry point: `--params`, one-line errors, exit codes.

0 done, 1 the work failed, 2 the call or the settings are wrong, 130 interrupted.
"""

import argparse
import contextlib
import io
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from ..errors import PatchcacheError
from .interrupts import AGAIN, INTERRUPTED, heed_interrupts, ignore_interrupts

NOBODY_READS = 141
"""Exit code of a command whose reader, like `head`, has gone, as shells use it."""


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a module that is a command, under the name by which it is called.

    Args:
        description: Docstring of the module, shown by `--help` as it is.
    """
    spec = sys.modules["__main__"].__spec__
    return _Parser(
        prog=f"python -m {spec.name}" if spec else None,
        # Letters are for readers of the code.
        description=description.partition("\n\nLetters:")[0] if description else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    """A parser whose help ends as all output of a command does: in a full disk, or unread."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the process, after the help or an error about the command line."""
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError as error:
            status = _end_of(error)
        super().exit(status, message)


def run_guarded(work: Callable[[], None]) -> NoReturn:
    """Run some work and exit with the code that says how it ended, without a traceback for
    anything that a user, a file or the machine can cause.
    """
    heed_interrupts()
    try:
        try:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    # A path can hold bytes that are no text. This writes what is left to write.
                    stream.reconfigure(errors="backslashreplace")
            work()
            if sys.stdout:
                sys.stdout.flush()
        finally:
            ignore_interrupts()
    except PatchcacheError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except OSError as error:
        sys.exit(_end_of(error))
    except KeyboardInterrupt:
        sys.exit(_fail(AGAIN, INTERRUPTED))
    sys.exit(0)


def _end_of(error: OSError) -> int:
    """Say what the system could not do, and return the exit code."""
    if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
        _drop_what_is_left(sys.stdout)
        return NOBODY_READS
    # Full disk, no permission: the system's own words say it best.
    return _fail(str(error), 1)


def _fail(message: str, exit_code: int) -> int:
    # A name of a file can hold what would break the line, or steer a terminal.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    # That nobody can read it must not change how the command ends.
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            _drop_what_is_left(stream)
    return exit_code


def _has_no_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _drop_what_is_left(stream: TextIO) -> None:
    """Send to nowhere what cannot be written: at its end, Python would try it and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
