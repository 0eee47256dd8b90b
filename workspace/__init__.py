"""Shared by all stages: settings, paths, locks, errors, and the frame of a stage."""

import cache.cli.startup  # noqa: F401 - explains a missing package
