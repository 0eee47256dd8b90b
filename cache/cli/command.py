"""The frame of every command: argument parser, one-line errors, exit codes.

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
from ..texts import one_line, without_passwords
from .interrupts import INTERRUPTED, INTERRUPTED_MESSAGE, handle_interrupts, ignore_interrupts

MEMORY_ADVICE = (
    "Lower micro_batch_tokens or batch_size of the stage's settings, or end other programs."
)

READER_GONE = 141
"""Exit code of a command whose reader, such as `head`, has ended: 128 + SIGPIPE, as in shells."""


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Return an argument parser for the module that runs as a command.

    Args:
        description: Docstring of the module, which `--help` shows verbatim.
    """
    spec = sys.modules["__main__"].__spec__
    return _Parser(
        prog=f"python -m {spec.name}" if spec else None,
        # The legend of letters is for readers of the code.
        description=description.partition("\n\nLetters:")[0] if description else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


class _Parser(argparse.ArgumentParser):
    """A parser that handles a full disk and a missing reader as `run_guarded` does."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the process after the help or an error in the command line."""
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError as error:
            status = _report(error)
        super().exit(status, message)


def run_guarded(work: Callable[[], None]) -> NoReturn:
    """Run a command's work and exit with its code; errors that a user, a file or the machine can
    cause are printed as one line, without a traceback.
    """
    handle_interrupts()
    try:
        try:
            for stream in (sys.stdout, sys.stderr):
                if isinstance(stream, io.TextIOWrapper):
                    # A path can hold bytes that are not UTF-8.
                    stream.reconfigure(errors="backslashreplace")
            work()
            if sys.stdout:
                sys.stdout.flush()
        finally:
            ignore_interrupts()
    except PatchcacheError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except OSError as error:
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(_fail(INTERRUPTED_MESSAGE, INTERRUPTED))
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        sys.exit(_fail(f"out of memory: {one_line(error)} {MEMORY_ADVICE}", 1))
    sys.exit(0)


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether main memory or a GPU's is full; the error of torch, which not every command
    loads, is known by its name.
    """
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _report(error: OSError) -> int:
    """Print a failure of the system, such as a full disk, and return the exit code."""
    if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
        _discard_output(sys.stdout)
        return READER_GONE
    return _fail(str(error), 1)


def _fail(message: str, exit_code: int) -> int:
    # A file's name can hold line breaks, and codes that steer a terminal.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in without_passwords(message))
    # A closed stderr must not change the exit code.
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            _discard_output(stream)
    return exit_code


def _has_no_reader(stream: TextIO) -> bool:
    """Return whether a stream is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _discard_output(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, so that Python's last flush does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
