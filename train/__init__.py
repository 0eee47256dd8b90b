"""Training: prompts, batches, projector, language model, the one loop and its two stages."""

import logging

# On import it advises a CPU kernel that only the network has.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
