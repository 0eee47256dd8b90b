"""Command: asks a finished run about one picture, and prints the answer as it is generated.

    python -m eval.ask --run runs/finetune --image photo.jpg "What is in the picture?"
    python -m eval.ask --run runs/finetune --image-id 42 "How many dogs are there?"

Without a question it writes a caption; a run of stage 1 can do nothing else. With --image-id the
features come from data/features, and no vision tower is loaded.
"""

import argparse
import os
import sys
from pathlib import Path

from cache.cli.command import command_parser, run_guarded
from eval.chat.answering import cached_features, make_sampling, stream_answer
from eval.chat.encoder import RunEncoder, read_picture
from eval.runs import load_run, open_run


def ask(arguments: argparse.Namespace) -> None:
    """Print a run's answer to the question on the command line."""
    sampling = None
    if arguments.temperature is not None:
        sampling = make_sampling(arguments.temperature, arguments.seed)
    # The language model comes last: it takes seconds to load, and a wrong path should not.
    picture = None if arguments.image is None else read_picture(arguments.image)
    run = open_run(arguments.run)
    if picture is None:
        patches_PD = cached_features(run, arguments.image_id)
    else:
        patches_PD = RunEncoder(run).encode(picture, str(arguments.image))
    trained = load_run(run)
    question = arguments.question.strip()
    try:
        for piece in stream_answer(trained, patches_PD, question, sampling=sampling):
            print(piece, end="", flush=True)
        print(flush=True)
    except BrokenPipeError:
        # The reader closed the pipe. Python flushes stdout once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Read the command line and ask."""
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run: runs/finetune")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image", type=Path, help="a picture file")
    source.add_argument("--image-id", type=int, help="an image of data/features")
    parser.add_argument("--temperature", type=float, help="sample at this one (default: greedy)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("question", nargs="?", default="", help="leave it out for a caption")
    arguments = parser.parse_args()
    run_guarded(lambda: ask(arguments))


if __name__ == "__main__":
    main()
