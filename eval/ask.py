"""Command: asks a finished run about one picture, and prints the answer while it is made.

    python -m eval.ask --run runs/finetune --image photo.jpg "What is in the picture?"
    python -m eval.ask --run runs/finetune --image-id 42 "How many dogs are there?"

Without a question it makes a caption, which is all that a run of stage 1 can. With --image-id the
features come from data/features, and no vision tower is loaded.

Letters: P patches, D width of the vision tower.
"""

import argparse
import os
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache import FeatureStore
from cache.cli.command import command_parser, run_guarded
from cache.errors import MissingImageError, SettingsError
from eval.chat.encoder import Vision, read_picture
from eval.runs import FinishedRun, LoadedRun, load_run, open_run
from eval.settings import EvaluateSettings
from train.data.prompts import dialogue_prompt
from train.model.generate import Sampling, stream
from workspace.paths import FEATURES

TOP_P = 0.9
"""What is sampled comes from the likeliest tokens that have this share together."""


def answer(
    trained: LoadedRun,
    patches_PD: NDArray[np.float16],
    question: str,
    *,
    turns: Sequence[tuple[str, str]] = (),
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> Generator[str, None, None]:
    """Let a run answer about one picture.

    Args:
        trained: The run.
        patches_PD: Features of the picture, float16.
        question: Empty for a caption.
        turns: Questions and answers about the picture so far.
        max_tokens: Most tokens of the answer; without it, those of the run's settings.
        sampling: How tokens are drawn; without it the likeliest is taken.

    Returns:
        The answer, piece by piece while it is made. What cannot be asked is refused before.

    Raises:
        SettingsError: A question to a run that only captions, one that is no text, or too long
            for the language model with all that was said before.
    """
    settings = trained.params.section("evaluate", EvaluateSettings)
    if max_tokens is None:
        max_tokens = settings.answer_tokens if question else settings.caption_tokens
    prompt_ids = _prompt(trained, question, turns, settings.caption_question)
    needed = len(patches_PD) + len(prompt_ids) + max_tokens
    most = trained.model.language_model.config.max_position_embeddings
    if needed > most:
        raise SettingsError(
            f"picture, conversation and answer take up to {needed} tokens, the language model "
            f"reads {most}. Ask something shorter, or start a new conversation."
        )
    return stream(
        trained.model,
        trained.tokenizer,
        patches_PD,
        prompt_ids,
        max_tokens=max_tokens,
        sampling=sampling,
    )


def _prompt(
    trained: LoadedRun, question: str, turns: Sequence[tuple[str, str]], caption_question: str
) -> list[int]:
    try:
        question.encode()
    except UnicodeEncodeError:
        raise SettingsError("the question has bytes that are no text.") from None
    if trained.answers:
        return dialogue_prompt(turns, question or caption_question, trained.tokenizer)
    if question:
        raise SettingsError(
            f"{trained.folder}: only captions, and cannot be asked: it holds no adapter. Leave the "
            f"question out, or name a run of finetune."
        )
    return []


def cached_features(run: FinishedRun, image_id: int) -> NDArray[np.float16]:
    """Return the features of an image of the working directory's store: float16 [P, D].

    Raises:
        SpecMismatchError: The run learned from features of another tower.
        MissingImageError: The store does not hold it.
        PatchcacheError: No store there.
    """
    store = FeatureStore(FEATURES)
    run.check_features(store.spec, str(FEATURES))
    if image_id not in store:
        ids = store.image_ids
        raise MissingImageError(
            f"{FEATURES}: holds no image {image_id}; its {len(ids)} ids are from {ids[0]} to "
            f"{ids[-1]}. Index and extract the image first, or name another one."
        )
    patches_PD: NDArray[np.float16] = store.gather([image_id])[0]
    return patches_PD


def ask(arguments: argparse.Namespace) -> None:
    """Print what the run named on the command line says."""
    sampling = None
    if arguments.temperature is not None:
        sampling = make_sampling(arguments.temperature, arguments.seed)
    # Before the model, which takes seconds to load: picture, run, features.
    picture = None if arguments.image is None else read_picture(arguments.image)
    run = open_run(arguments.run)
    if picture is None:
        patches_PD = cached_features(run, arguments.image_id)
    else:
        patches_PD = Vision(run).look(picture, str(arguments.image))
    trained = load_run(arguments.run, run)
    try:
        for piece in answer(trained, patches_PD, arguments.question.strip(), sampling=sampling):
            print(piece, end="", flush=True)
        print(flush=True)
    except BrokenPipeError:
        # Who reads has enough. Python would flush once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_sampling(temperature: float, seed: int) -> Sampling:
    """Say how tokens are drawn.

    Raises:
        SettingsError: Of a temperature or with a seed that cannot be.
    """
    try:
        return Sampling(temperature=temperature, top_p=TOP_P, seed=seed)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def main() -> None:
    """Read the command line and ask."""
    parser = command_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run: runs/finetune")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image", type=Path, help="a picture file")
    source.add_argument("--image-id", type=int, help="an image of data/features")
    parser.add_argument("--temperature", type=float, help="draw tokens; without: the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("question", nargs="?", default="", help="without: a caption")
    arguments = parser.parse_args()
    run_guarded(lambda: ask(arguments))


if __name__ == "__main__":
    main()
