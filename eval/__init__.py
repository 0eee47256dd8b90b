"""Evaluation: generation, scores beside their controls, the report."""

import cache.cli.startup  # noqa: F401 - says what is missing, if anything is
