"""Asks a model about pictures twice: with their own features, and with another picture's.

The second is the blind control: what a model reaches with it, it did not learn from the pictures.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from cache import FeatureStore
from cache.errors import StageError
from eval.metrics import (
    cider_by_image,
    exact_match,
    repeated_4grams,
    score_captions,
    token_f1,
)
from eval.settings import EvaluateSettings
from train.data import Example, Question
from train.generate import Generation, generate
from train.model import CaptionModel
from train.prompts import question_text
from train.step import build_step, mean_loss

LOSS_TOKENS = 4096
"""Positions of one forward pass when only the loss is wanted, padding included."""


@dataclass(frozen=True)
class Asked:
    """One text that was asked for, what came, and what came blind."""

    image_id: int
    question: str
    """Empty when the model was to go on straight behind the patches."""
    targets: tuple[str, ...]
    seen: Generation
    blind: Generation
    score: float
    """CIDEr of a caption, exact match of an answer."""


@dataclass(frozen=True)
class Model:
    """What is asked, and how its input is made."""

    name: str
    model: CaptionModel
    tokenizer: PreTrainedTokenizerBase
    store: FeatureStore


def other_images(image_ids: Sequence[int], store: FeatureStore) -> dict[int, int]:
    """Give each image another one: the one half a round further among them.

    Raises:
        StageError: The store holds a single image, so there is no other.
    """
    distinct = sorted(set(image_ids))
    if len(distinct) == 1:
        distinct += [int(i) for i in store.image_ids if i != distinct[0]][:1]
    if len(distinct) == 1:
        raise StageError(f"{store.root}: holds one image, so there is none for the blind control.")
    half = len(distinct) // 2
    return dict(zip(distinct, distinct[half:] + distinct[:half], strict=True))


def ask_captions(
    asked: Model, references: dict[int, list[str]], question: str, settings: EvaluateSettings
) -> tuple[dict[str, Any], list[Asked]]:
    """Let a model caption images, and score it beside its blind control.

    Args:
        asked: The model.
        references: Image id to the captions that people wrote; at least one image.
        question: How it is asked; empty for a model that only captions, which needs no prompt.
        settings: Limits.

    Returns:
        The scores with a `blind` twin, and every caption.
    """
    image_ids = list(references)
    prompts = [question_text(question) if question else ""] * len(image_ids)
    seen, blind = _ask(asked, image_ids, prompts, settings.caption_tokens, settings.batch_size)
    scores = _caption_scores(references, image_ids, seen)
    scores["blind"] = _caption_scores(references, image_ids, blind)
    texts = {i: generation.text for i, generation in zip(image_ids, seen, strict=True)}
    cider = cider_by_image(references, texts)
    captions = [
        Asked(i, question, tuple(references[i]), s, b, cider[i])
        for i, s, b in zip(image_ids, seen, blind, strict=True)
    ]
    return scores, captions


def ask_questions(
    asked: Model, questions: Sequence[Question], settings: EvaluateSettings
) -> tuple[dict[str, Any], list[Asked]]:
    """Ask a model questions, and score it beside its blind control.

    Args:
        asked: The model.
        questions: At least one.
        settings: Limits.

    Returns:
        The scores with a `blind` twin, without the loss, and every answer.
    """
    image_ids = [question.image_id for question in questions]
    prompts = [question_text(question.question) for question in questions]
    seen, blind = _ask(asked, image_ids, prompts, settings.answer_tokens, settings.batch_size)
    targets = [question.answer for question in questions]
    scores = _answer_scores(targets, seen)
    scores["blind"] = _answer_scores(targets, blind)
    answers = [
        Asked(q.image_id, q.question, (q.answer,), s, b, exact_match(q.answer, s.text))
        for q, s, b in zip(questions, seen, blind, strict=True)
    ]
    return scores, answers


def answer_losses(
    asked: Model, examples: Sequence[Example], max_text_tokens: int
) -> tuple[float, float]:
    """Return the mean loss of an answer's token: with the image, and with another one.

    Raises:
        StageError: No other image, no answer within `max_text_tokens`, or a loss that is no number.
    """
    others = other_images([example.image_id for example in examples], asked.store)
    blind = [Example(others[example.image_id], example.texts) for example in examples]
    seen_loss, blind_loss = (
        mean_loss(
            asked.model,
            build_step(
                part,
                asked.tokenizer,
                asked.store,
                pass_tokens=LOSS_TOKENS,
                row_tokens=LOSS_TOKENS,
                max_text_tokens=max_text_tokens,
                device=asked.model.device,
            ),
        )
        for part in (examples, blind)
    )
    if not math.isfinite(seen_loss + blind_loss):
        raise StageError(
            f"{asked.name}: the loss of the answers is {seen_loss}, blind {blind_loss}, wanted "
            f"finite numbers. Weights or features are damaged: run the {asked.name} stage again."
        )
    return seen_loss, blind_loss


def _ask(
    asked: Model, image_ids: list[int], prompts: Sequence[str], max_tokens: int, batch_size: int
) -> tuple[list[Generation], list[Generation]]:
    others = other_images(image_ids, asked.store)
    seen, blind = (
        generate(
            asked.model,
            asked.tokenizer,
            asked.store,
            ids,
            prompts,
            max_tokens=max_tokens,
            batch_size=batch_size,
            description=f"{asked.name}, {what}",
        )
        for what, ids in (("seeing", image_ids), ("blind", [others[i] for i in image_ids]))
    )
    return seen, blind


def _caption_scores(
    references: dict[int, list[str]], image_ids: list[int], made: list[Generation]
) -> dict[str, Any]:
    texts = {i: generation.text for i, generation in zip(image_ids, made, strict=True)}
    return {**score_captions(references, texts), **_form_scores(made)}


def _answer_scores(targets: list[str], made: list[Generation]) -> dict[str, Any]:
    pairs = [(target, g.text) for target, g in zip(targets, made, strict=True)]
    return {
        "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
        "token_f1": float(np.mean([token_f1(*pair) for pair in pairs])),
        **_form_scores(made),
    }


def _form_scores(made: list[Generation]) -> dict[str, Any]:
    """Score what needs no target: whether texts end, repeat themselves, and how long they are."""
    return {
        "stop_rate": float(np.mean([generation.stopped for generation in made])),
        "repeated_4grams": repeated_4grams(generation.text for generation in made),
        "mean_tokens": float(np.mean([generation.num_tokens for generation in made])),
        "count": len(made),
    }
