"""Chooses what a model is asked: validation images, held-out questions, yes-no questions.

Images that were trained on are found here, and left out unless the settings keep them.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from cache import FeatureStore
from eval.scoring.contamination import Contaminated, counts, read_images
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
from train.data.prompts import encode, question_text
from workspace.errors import StageError

KINDS = ("captions", "answers", "pope")

Item = TypeVar("Item")


@dataclass(frozen=True)
class Work:
    """Everything that is asked, and what is not and why."""

    references: dict[int, list[str]]
    """Captions that people wrote of validation images, by image id."""
    questions: list[Question]
    """About held-out images."""
    examples: list[Example]
    """The images of the questions with their whole conversations."""
    pope: dict[str, list[YesNo]]
    """Subset to its questions."""
    num_too_long: int
    """Questions that are left out because they alone exceed `max_text_tokens`."""
    without_features: dict[str, int]
    """For each of `KINDS`, images that have no features in the store."""
    num_images: dict[str, int]
    """For each of `KINDS`, images that could be asked about."""
    contaminated: dict[str, list[Contaminated]]
    """For each of `KINDS`, those of them that were trained on."""
    left_out: bool
    """Whether those are left out."""
    splits: dict[int, str]
    """Image id to train or val, of all images."""
    file_names: dict[int, str]
    """Image id to the name of its file in the index, of all images."""

    def contamination_counts(self) -> dict[str, Any]:
        """Return the section of eval.json."""
        return {
            kind: counts(self.num_images[kind], self.contaminated[kind], left_out=self.left_out)
            for kind in KINDS
        }

    def contamination_list(self) -> dict[str, list[dict[str, Any]]]:
        """Return the content of contamination.json."""
        return {kind: list(map(asdict, found)) for kind, found in self.contaminated.items()}


def choose_work(
    settings: EvaluateSettings,
    store: FeatureStore,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> Work:
    """Read the index and choose what is asked, by the seed alone.

    Raises:
        StageError: A table is missing or damaged, most images have no features, or every question
            is too long.
    """
    captioned = read_caption_examples("val")
    held_out = read_conversation_examples("holdout")
    pope = read_pope()
    ids = {
        "captions": captioned.image_ids.tolist(),
        "answers": held_out.image_ids.tolist(),
        "pope": sorted({question.image_id for qs in pope.values() for question in qs}),
    }
    images = read_images()
    contaminated = {kind: images.trained_on(ids[kind]) for kind in KINDS}
    shut_out: dict[str, set[int]] = {
        kind: {one.image_id for one in found} if settings.exclude_contaminated else set()
        for kind, found in contaminated.items()
    }
    captioned_here = with_features(captioned, store, "captions of split val")
    held_out_here = with_features(held_out, store, "conversations of split holdout")
    has_features = store.contains(np.array(ids["pope"], dtype=np.int64)).tolist()
    pope_ids = {i for i, there in zip(ids["pope"], has_features, strict=True) if there}
    all_questions = _questions(held_out_here.without(shut_out["answers"]), settings)
    askable = _not_too_long(all_questions, tokenizer, settings.max_text_tokens)
    questions = choose(askable, settings.questions, seed)
    return Work(
        references=_references(captioned_here.without(shut_out["captions"]), settings, seed),
        questions=questions,
        examples=held_out_here.only({question.image_id for question in questions})[:],
        pope=_pope(pope, pope_ids - shut_out["pope"], settings, seed),
        num_too_long=len(all_questions) - len(askable),
        without_features={
            "captions": len(captioned) - len(captioned_here),
            "answers": len(held_out) - len(held_out_here),
            "pope": len(ids["pope"]) - len(pope_ids),
        },
        num_images={kind: len(ids[kind]) for kind in KINDS},
        contaminated=contaminated,
        left_out=settings.exclude_contaminated,
        splits=images.splits,
        file_names=images.file_names,
    )


def choose(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    """Return up to so many items, chosen by the seed alone, in their order."""
    order = np.random.default_rng(seed).permutation(len(items))[:most]
    return [items[number] for number in sorted(order)]


def _references(examples: Examples, settings: EvaluateSettings, seed: int) -> dict[int, list[str]]:
    return {
        example.image_id: [caption for ((_, caption),) in example.texts]
        for example in choose(examples, settings.caption_images, seed)
    }


def _questions(examples: Examples, settings: EvaluateSettings) -> list[Question]:
    """Read questions; one that asks for a caption is none: captions are scored as captions."""
    known = set(examples.image_ids.tolist())
    return [
        question
        for question in read_questions("holdout")
        if question.image_id in known and question.question != settings.caption_question
    ]


def _not_too_long(
    questions: list[Question], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[Question]:
    """Leave out what would fill the memory: a batch is as long as its longest prompt."""
    prompts = encode([question_text(question.question) for question in questions], tokenizer)
    kept = [q for q, prompt in zip(questions, prompts, strict=True) if len(prompt) <= max_tokens]
    if questions and not kept:
        raise StageError(
            f"evaluate.max_text_tokens: each of {len(questions)} questions has more than "
            f"{max_tokens} tokens. Raise it."
        )
    return kept


def _pope(
    subsets: dict[str, list[YesNo]],
    image_ids: Collection[int],
    settings: EvaluateSettings,
    seed: int,
) -> dict[str, list[YesNo]]:
    """Choose images, each with all its questions, so that yes and no stay balanced."""
    chosen = {}
    for name, questions in subsets.items():
        asked_about = sorted({q.image_id for q in questions if q.image_id in image_ids})
        images = set(choose(asked_about, settings.pope_images, seed))
        chosen[name] = [question for question in questions if question.image_id in images]
    return {name: questions for name, questions in chosen.items() if questions}
