"""The frame of a stage: `--params`, one-line errors, exit codes."""

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cache.cli.command import command_parser, run_guarded
from workspace.settings import Params


def run_stage(stage: Callable[[Params], None], description: str) -> NoReturn:
    """Read the settings named on the command line, run a stage, exit.

    Args:
        stage: The work; raises a `PatchcacheError` for a problem that a user can solve.
        description: Docstring of the stage's module, shown by `--help`.
    """
    parser = command_parser(description)
    parser.add_argument(
        "--params", type=Path, default=Path("params.yaml"), help="settings (default: %(default)s)"
    )
    arguments = parser.parse_args()
    run_guarded(lambda: stage(Params.read(arguments.params)))
