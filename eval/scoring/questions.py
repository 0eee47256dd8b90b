"""Chooses the evaluation set: captioned images, held-out questions, yes-no questions.

Images that were trained on are found here, and left out unless the settings keep them.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from cache import FeatureStore
from eval.scoring.contamination import ContaminatedImage, read_images
from eval.scoring.yes_no import YesNo, read_pope
from eval.settings import EvaluateSettings
from train.data.examples import (
    Example,
    Examples,
    Question,
    read_caption_examples,
    read_conversation_examples,
    read_questions,
    with_features,
)
from train.data.prompts import PromptFormat
from workspace.errors import StageError

Item = TypeVar("Item")


@dataclass(frozen=True)
class EvaluationSet:
    """The images and questions of an evaluation, and the counts of those left out.

    The dictionaries by kind have the keys captions, answers and pope.
    """

    caption_split: str
    """The split whose images are captioned: test if it has captions, else val."""
    references: dict[int, list[str]]
    """Image of that split to its captions by people."""
    questions: list[Question]
    """Questions about held-out images."""
    examples: list[Example]
    """The images of the questions with their whole conversations."""
    pope: dict[str, list[YesNo]]
    """Subset to its yes-no questions."""
    num_too_long: int
    """Questions left out because they alone exceed `max_text_tokens`."""
    without_features: dict[str, int]
    """Kind to the number of its images without features in the store."""
    num_images: dict[str, int]
    """Kind to the number of its images in the index."""
    contaminated: dict[str, list[ContaminatedImage]]
    """Kind to its images that were trained on."""
    excludes_contaminated: bool
    """Whether the images that were trained on are left out."""
    splits: dict[int, str]
    """Image id to train, val or test, of all images."""
    file_names: dict[int, str]
    """Image id to file name in the index, of all images."""

    def contamination_counts(self) -> dict[str, Any]:
        """Return section `contamination` of eval.json."""
        return {
            kind: {
                "images": self.num_images[kind],
                "contaminated": len(found),
                "left_out": len(found) if self.excludes_contaminated else 0,
            }
            for kind, found in self.contaminated.items()
        }

    def contamination_list(self) -> dict[str, list[dict[str, Any]]]:
        """Return the content of contamination.json."""
        return {kind: list(map(asdict, found)) for kind, found in self.contaminated.items()}


def choose_evaluation_set(
    settings: EvaluateSettings,
    store: FeatureStore,
    prompt_format: PromptFormat,
    seed: int,
) -> EvaluationSet:
    """Read the index and choose images and questions, by the seed alone.

    Raises:
        StageError: A table is missing or damaged, most images have no features, or every question
            is too long.
    """
    caption_split, captioned = _captioned_images()
    held_out = read_conversation_examples("holdout")
    pope = read_pope()
    ids = {
        "captions": captioned.image_ids.tolist(),
        "answers": held_out.image_ids.tolist(),
        "pope": sorted({question.image_id for qs in pope.values() for question in qs}),
    }
    images = read_images()
    contaminated = {kind: images.trained_on(image_ids) for kind, image_ids in ids.items()}
    excluded: dict[str, set[int]] = {
        kind: {image.image_id for image in found} if settings.exclude_contaminated else set()
        for kind, found in contaminated.items()
    }
    captioned_stored = with_features(captioned, store, f"captions of split {caption_split}")
    held_out_stored = with_features(held_out, store, "conversations of split holdout")
    is_stored = store.contains(np.array(ids["pope"], dtype=np.int64)).tolist()
    pope_stored = {i for i, stored in zip(ids["pope"], is_stored, strict=True) if stored}
    all_questions = _questions(held_out_stored.without(excluded["answers"]), settings)
    fitting = _not_too_long(all_questions, prompt_format, settings.max_text_tokens)
    questions = choose(fitting, settings.questions, seed)
    return EvaluationSet(
        caption_split=caption_split,
        references=_references(captioned_stored.without(excluded["captions"]), settings, seed),
        questions=questions,
        examples=held_out_stored.only({question.image_id for question in questions})[:],
        pope=_pope(pope, pope_stored - excluded["pope"], settings, seed),
        num_too_long=len(all_questions) - len(fitting),
        without_features={
            "captions": len(captioned) - len(captioned_stored),
            "answers": len(held_out) - len(held_out_stored),
            "pope": len(ids["pope"]) - len(pope_stored),
        },
        num_images={kind: len(image_ids) for kind, image_ids in ids.items()},
        contaminated=contaminated,
        excludes_contaminated=settings.exclude_contaminated,
        splits=images.splits,
        file_names=images.file_names,
    )


def choose(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    """Return at most so many items, chosen by the seed alone, in their order."""
    order = np.random.default_rng(seed).permutation(len(items))[:most]
    return [items[number] for number in sorted(order)]


def _captioned_images() -> tuple[str, Examples]:
    """Return the split that is captioned, and its images with their captions.

    Training validates on val, so split test is the one for scores where there is one.
    """
    test = read_caption_examples("test")
    return ("test", test) if len(test) else ("val", read_caption_examples("val"))


def _references(examples: Examples, settings: EvaluateSettings, seed: int) -> dict[int, list[str]]:
    return {
        example.image_id: [caption for ((_, caption),) in example.texts]
        for example in choose(examples, settings.caption_images, seed)
    }


def _questions(examples: Examples, settings: EvaluateSettings) -> list[Question]:
    """Read the held-out questions, except the caption request, which is scored as a caption."""
    image_ids = set(examples.image_ids.tolist())
    return [
        question
        for question in read_questions("holdout")
        if question.image_id in image_ids and question.question != settings.caption_question
    ]


def _not_too_long(
    questions: list[Question], prompt_format: PromptFormat, max_tokens: int
) -> list[Question]:
    """Leave out long questions: a batch is as long as its longest prompt, and could fill memory."""
    prompts = prompt_format.prompts([question.question for question in questions])
    fitting = [
        question
        for question, prompt in zip(questions, prompts, strict=True)
        if len(prompt) <= max_tokens
    ]
    if questions and not fitting:
        raise StageError(
            f"evaluate.max_text_tokens: each of {len(questions)} questions has more than "
            f"{max_tokens} tokens. Raise it."
        )
    return fitting


def _pope(
    subsets: dict[str, list[YesNo]],
    image_ids: Collection[int],
    settings: EvaluateSettings,
    seed: int,
) -> dict[str, list[YesNo]]:
    """Choose images of each subset, each with all its questions: yes and no stay balanced."""
    chosen = {}
    for name, questions in subsets.items():
        available = sorted({q.image_id for q in questions if q.image_id in image_ids})
        images = set(choose(available, settings.pope_images, seed))
        chosen[name] = [question for question in questions if question.image_id in images]
    return {name: questions for name, questions in chosen.items() if questions}
