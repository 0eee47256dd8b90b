"""Rebuilds the demo's tiny checkpoints: `python -m demo.checkpoints [OUT]`.

Writes `clip/` (an open_clip architecture and its weights), `phi/` and `llama/` (transformers models
and their tokenizers). Takes about 40 minutes on two CPU cores, without a network. The same machine
and library versions reproduce the same files.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from cache.cli.command import command_parser, run_guarded
from demo.memory import keep_freed_memory
from demo.tokenizer import train_tokenizer
from demo.train_clip import train_clip
from demo.train_language_model import train_llama, train_phi

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""The folder of the project's own checkpoints."""

_SEED = 0


def write_checkpoints(out: Path) -> None:
    """Train the tokenizer, then CLIP and the language models, and write them to a folder.

    No scene of the training is in a rendered world.
    """
    tokenizer = train_tokenizer(_SEED)
    # Not fork, which would copy torch's threads in an unknown state.
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawning, initializer=_prepare_process) as processes:
        jobs = [
            processes.submit(train_clip, out / "clip", tokenizer, _SEED),
            processes.submit(train_phi, out / "phi", tokenizer, _SEED),
            processes.submit(train_llama, out / "llama", tokenizer, _SEED),
        ]
        for job in jobs:
            job.result()


def _prepare_process() -> None:
    """Train with one thread, so that the order of sums does not depend on the machine's load."""
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def main() -> None:
    """Read the command line and train."""
    parser = command_parser(__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", nargs="?", default=CHECKPOINTS)
    folder = parser.parse_args().out
    run_guarded(lambda: write_checkpoints(folder))


if __name__ == "__main__":
    main()
