"""What a command says when it ends before it has begun: without its environment, or interrupted.

A command imports for seconds before its own frame, `cache.cli.command`, can catch anything. Every
package of commands imports this one first, which needs nothing that must be installed.
"""

import contextlib
import os
import sys
from types import FrameType, TracebackType
from typing import NoReturn

from .interrupts import AGAIN, INTERRUPTED, heed_interrupts, ignore_interrupts

OURS = ("bench", "cache", "demo", "eval", "pipeline", "train", "workspace")
"""Packages that no environment brings: one that is missing is a mistake of ours."""


def explain(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Say in one line why an import was not finished; all else gets Python's traceback."""
    if isinstance(error, ModuleNotFoundError) and _is_of_the_environment(error.name):
        print(
            f"error: the Python package {error.name!r} is not installed in {sys.prefix}. Run "
            f"`source .venv/bin/activate` in the project's folder first; `make demo` makes .venv.",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


def _is_of_the_environment(name: str | None) -> bool:
    # A part of a package that is there is missing for another reason.
    return bool(name) and "." not in str(name) and name not in OURS


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """End the process at a signal, with the line and exit code that it has later, too.

    An exception could be caught by whatever is being imported.
    """
    ignore_interrupts()
    with contextlib.suppress(OSError):
        os.write(2, f"error: {AGAIN}\n".encode())
    os._exit(INTERRUPTED)


OPENMP = {"GOMP_SPINCOUNT": "10000"}
"""Environment in which idle OpenMP threads give up their core soon: as fast on a quiet machine, and
2.3 times as fast beside other work (docs/design-notes.md)."""

# Python's name for a command while it looks for its module: whoever imports the package as a
# library keeps the hook and the signals of his own.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = explain
    # Read by OpenMP when torch loads it.
    os.environ |= OPENMP | os.environ
    heed_interrupts(leave)
