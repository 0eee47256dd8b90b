"""Training: packed batches, the model, the training loop, and its two stages."""

import logging
import sys

if sys.argv[:1] == ["-m"]:
    # A command: no cache.py of the working directory comes before ours.
    sys.path.insert(0, __path__[0].rpartition("/")[0])

# Says in one line which package the environment lacks.
import cache.cli.startup  # noqa: F401

# bitsandbytes logs on import that a CPU kernel could be downloaded.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
