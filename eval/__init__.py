"""Evaluation: scores beside their controls, the report, and commands that use a trained run."""

import sys

if sys.argv[:1] == ["-m"]:
    # A command: no cache.py of the working directory comes before ours.
    sys.path.insert(0, __path__[0].rpartition("/")[0])

# Says in one line which package the environment lacks.
import cache.cli.startup  # noqa: F401
