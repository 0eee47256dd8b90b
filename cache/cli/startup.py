"""Messages of a command that ends during its imports: a package is missing, or a signal came.

A command imports for seconds before `run_guarded` can catch anything. Every package of commands
imports this module first; it needs the standard library alone.
"""

import contextlib
import os
import sys
from types import FrameType, TracebackType
from typing import NoReturn

from .interrupts import INTERRUPTED, INTERRUPTED_MESSAGE, handle_interrupts, ignore_interrupts


def explain(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Name a package that is not installed in one line; print a traceback for any other error."""
    # A name with a dot is a missing part of an installed package: a mistake in the code.
    if isinstance(error, ModuleNotFoundError) and error.name and "." not in error.name:
        print(
            f"error: the Python package {error.name!r} is not installed in {sys.prefix}. Activate "
            f"the environment that has it: `source .venv/bin/activate` in the project's folder, "
            f"where `make demo` makes it.",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """End the process with the message and exit code of an interrupted command.

    An exception would not do: the package that is being imported could catch it.
    """
    ignore_interrupts()
    with contextlib.suppress(OSError):
        os.write(2, f"error: {INTERRUPTED_MESSAGE}\n".encode())
    os._exit(INTERRUPTED)


OPENMP = {"GOMP_SPINCOUNT": "10000"}
"""Environment in which idle OpenMP threads give up their core soon (see docs/design-notes.md)."""

# `sys.argv` starts with "-m" while Python looks for a command's module. A program that imports the
# package as a library keeps its own hook and signal handlers.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = explain
    # OpenMP reads the environment when torch loads it.
    os.environ |= OPENMP | os.environ
    handle_interrupts(leave)
