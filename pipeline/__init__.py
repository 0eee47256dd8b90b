"""Everything before training: fetch, index, decode, encode, extract."""

import cache.cli.startup  # noqa: F401 - says what is missing, if anything is
