"""The embedded default: a small drawn world and two tiny checkpoints that know it."""

import cache.cli.startup  # noqa: F401 - says what is missing, if anything is
