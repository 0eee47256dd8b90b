"""Rebuilds the demo's two tiny checkpoints: `python -m demo.checkpoints [OUT]`.

Writes `clip/` (an open_clip architecture and its weights) and `phi/` (a transformers model with
its tokenizer). Takes about 20 minutes on two CPU cores and needs no network. The same machine
and library versions give the same files again.
"""

import argparse
from pathlib import Path

import torch

from demo.memory import keep_freed_memory
from demo.tokenizer import train_tokenizer
from demo.train_clip import train_clip
from demo.train_phi import train_phi

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""The folder of the checkpoints that come with the project."""

_SEED = 0
_NUM_THREADS = 2


def write_checkpoints(out: Path) -> None:
    """Train the tokenizer, the CLIP and the Phi, and write them to a folder.

    The scenes they learn from are other ones than those of any rendered world.
    """
    keep_freed_memory()
    # The order of a sum's terms depends on the number of threads, and with it the last bits.
    torch.set_num_threads(_NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(_SEED)
    train_clip(out / "clip", tokenizer, _SEED)
    train_phi(out / "phi", tokenizer, _SEED)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", default=CHECKPOINTS)
    write_checkpoints(parser.parse_args().out)


if __name__ == "__main__":
    main()
