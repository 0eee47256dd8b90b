"""The frame around every stage's entry point: `--params`, one-line errors, exit codes.

0 done, 1 the work failed, 2 the call or the settings are wrong, 130 interrupted.
"""

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cache.errors import CacheError
from cache.interrupts import heed_interrupts, ignore_interrupts
from cache.settings import Params

INTERRUPTED = 130
"""Exit code of a stage stopped by Ctrl-C, SIGTERM or SIGHUP, as shells use it."""


def run_stage(stage: Callable[[Params], None], description: str) -> NoReturn:
    """Read the settings named on the command line, run a stage, exit.

    Args:
        stage: The work; raises a `CacheError` for what a user can mend.
        description: First lines of the stage's module, shown by `--help`.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="settings (default: %(default)s)"
    )
    arguments = parser.parse_args()
    run_guarded(lambda: stage(Params.read(arguments.params)))


def run_guarded(work: Callable[[], None]) -> NoReturn:
    """Run some work and exit with the code that says how it ended, without a traceback for
    anything that a user, a file or the machine can cause.
    """
    heed_interrupts()
    # A path can hold bytes that are no text.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            work()
        finally:
            ignore_interrupts()
    except CacheError as error:
        sys.exit(_fail(str(error), error.exit_code))
    except OSError as error:
        # Full disk, no permission: the system's own words say it best.
        sys.exit(_fail(str(error), 1))
    except KeyboardInterrupt:
        message = "interrupted; run the same command again"
        sys.exit(_fail(message, INTERRUPTED))
    sys.exit(0)


def _fail(message: str, exit_code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return exit_code
