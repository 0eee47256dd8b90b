"""Training: prompts, batches, projector, language model, the one loop and its two stages."""

import logging

import cache.cli.startup  # noqa: F401 - says what is missing, if anything is

# On import it advises a CPU kernel that only the network has.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
