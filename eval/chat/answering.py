"""Generates the answer of a run to a question about one picture, piece by piece.

Letters: P patches, D width of the vision tower.
"""

from collections.abc import Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from cache import FeatureStore
from cache.errors import MissingImageError, SettingsError
from eval.runs import FinishedRun, LoadedRun
from eval.settings import EvaluateSettings
from train.model.generate import Sampling, stream
from train.stages.untrained import REASONS
from workspace.paths import FEATURES

TOP_P = 0.9
"""Nucleus sampling: tokens are drawn from the likeliest ones with this total probability."""


def stream_answer(
    trained: LoadedRun,
    patches_PD: NDArray[np.float16],
    question: str,
    *,
    turns: Sequence[tuple[str, str]] = (),
    max_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> Generator[str, None, None]:
    """Answer a question about one picture.

    Args:
        trained: The run.
        patches_PD: Features of the picture, float16.
        question: Empty for a caption.
        turns: Earlier questions and answers about the picture.
        max_tokens: Limit of the answer; by default the limit in the run's settings.
        sampling: Sampling parameters; without them decoding is greedy.

    Returns:
        A generator of the pieces of the answer. All errors are raised before it is returned.

    Raises:
        SettingsError: The run only captions, the question is not valid text, or the conversation
            is too long for the language model.
    """
    settings = trained.params.section("evaluate", EvaluateSettings)
    if max_tokens is None:
        max_tokens = settings.answer_tokens if question else settings.caption_tokens
    prompt_ids = _prompt_ids(trained, question, turns, settings.caption_question)
    lead = trained.prompt_format.lead
    num_tokens = len(lead) + len(patches_PD) + len(prompt_ids) + max_tokens
    limit = trained.model.language_model.config.max_position_embeddings
    if num_tokens > limit:
        raise SettingsError(
            f"picture, conversation and answer take up to {num_tokens} tokens, the language model "
            f"reads {limit}. Ask something shorter, or start a new conversation."
        )
    return stream(
        trained.model,
        trained.prompt_format,
        patches_PD,
        prompt_ids,
        max_tokens=max_tokens,
        sampling=sampling,
    )


def _prompt_ids(
    trained: LoadedRun, question: str, turns: Sequence[tuple[str, str]], caption_question: str
) -> list[int]:
    try:
        question.encode()
    except UnicodeEncodeError:
        raise SettingsError("the question has bytes that are not valid text.") from None
    if trained.answers:
        return trained.prompt_format.dialogue_prompt(turns, question or caption_question)
    if question:
        advice = ", or name a run of the finetune stage"
        if not trained.is_trained:
            advice = f": the finetune stage trained none, because {REASONS['finetune']}"
        raise SettingsError(
            f"{trained.folder}: has no adapter, so it writes only captions. Leave the question "
            f"out{advice}."
        )
    return trained.prompt_format.prompts([None])[0]


def make_sampling(temperature: float, seed: int) -> Sampling:
    """Return sampling parameters.

    Raises:
        SettingsError: The temperature or the seed is out of range.
    """
    try:
        return Sampling(temperature=temperature, top_p=TOP_P, seed=seed)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def cached_features(run: FinishedRun, image_id: int) -> NDArray[np.float16]:
    """Return the features of an image from `data/features`: float16 [P, D].

    Raises:
        SpecMismatchError: The run was trained on features of another tower.
        MissingImageError: The store does not hold the image.
        PatchcacheError: There is no store.
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
