"""What every stage stands on: settings, paths, errors, and the frame of a stage."""

import cache.cli.startup  # noqa: F401 - says what is missing, if anything is
