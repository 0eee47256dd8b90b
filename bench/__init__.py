"""Side-by-side measurements; each prints a table and writes a JSON file."""

import cache.cli.startup  # noqa: F401 - says what is missing, if anything is
