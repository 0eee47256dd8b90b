"""Asks a model about pictures in all ways of asking, and scores it beside its controls."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.bootstrap import Measure
from eval.metrics import cider_by_image, exact_match, is_short, token_f1, yes_or_no
from eval.scoring.conditions import CONTROLS, SEEN, EvaluatedModel, conditions
from eval.scoring.generation_cache import cached
from eval.scoring.losses import Losses
from eval.scoring.measures import answer_measures, caption_measures, form_measures, pope_measures
from eval.scoring.question_types import question_type
from eval.scoring.yes_no import YesNo
from eval.settings import EvaluateSettings
from train.data.examples import Question
from train.data.prompts import question_text
from train.model.generate import Generation, generate

YES_NO_TOKENS = 16
"""Most tokens of a yes-no answer, of which the first sentence alone counts."""

Scores = dict[str, Any]
Made = Mapping[str, Sequence[Generation]]
"""Way of asking to what came, text by text."""
MeasuresOf = Callable[[Sequence[str]], Mapping[str, Measure]]


@dataclass(frozen=True)
class Prediction:
    """One text that was asked for, and what came in each way of asking."""

    image_id: int
    question: str
    """Empty when the model was to go on straight behind the patches."""
    targets: tuple[str, ...]
    made: dict[str, Generation]
    score: float
    """CIDEr of a caption; exact match of an answer whose target is short, token F1 of another; 1 or
    0 of yes and no."""


def ask_captions(
    asked: EvaluatedModel,
    references: dict[int, list[str]],
    question: str,
    settings: EvaluateSettings,
) -> tuple[Scores, list[Prediction]]:
    """Let a model caption images.

    Args:
        asked: The model.
        references: Image id to the captions that people wrote; at least one image.
        question: How it is asked; empty for a model that only captions, which needs no prompt.
        settings: Limits.

    Returns:
        The scores with those of the controls, and every caption.
    """
    image_ids = sorted(references)
    prompts = [question_text(question) if question else ""] * len(image_ids)
    made = _ask(asked, image_ids, prompts, settings.caption_tokens, settings.batch_size)

    def captions(texts: Sequence[str]) -> dict[int, str]:
        return dict(zip(image_ids, texts, strict=True))

    scores = _section(
        made, image_ids, lambda texts: caption_measures(references, captions(texts)), asked.seed
    )
    cider = cider_by_image(references, captions(_texts(made[SEEN])))
    said = [
        Prediction(i, question, tuple(references[i]), one, cider[i])
        for i, one in zip(image_ids, _by_text(made), strict=True)
    ]
    return scores, said


def ask_questions(
    asked: EvaluatedModel,
    questions: Sequence[Question],
    losses: Mapping[str, Losses],
    settings: EvaluateSettings,
) -> tuple[Scores, list[Prediction]]:
    """Ask a model questions, each without the turns before it.

    Args:
        asked: The model.
        questions: At least one.
        losses: Of the right answers, in each way of asking.
        settings: Limits.

    Returns:
        The scores with those of the controls and of each type of question, and every answer.
    """
    image_ids = [question.image_id for question in questions]
    prompts = [question_text(question.question) for question in questions]
    made = _ask(asked, image_ids, prompts, settings.answer_tokens, settings.batch_size)
    said = [
        Prediction(
            q.image_id, q.question, (q.answer,), one, _answer_score(q.answer, one[SEEN].text)
        )
        for q, one in zip(questions, _by_text(made), strict=True)
    ]
    scores = _answer_section(said, asked.seed)
    for view, one in losses.items():
        section = scores if view == SEEN else scores[view]
        section["loss"] = one.measure.value
        section["intervals"]["loss"] = one.measure.interval(one.image_ids, asked.seed)
    scores["by_type"] = {
        name: _answer_section(
            [one for one in said if question_type(one.question) == name], asked.seed
        )
        for name in sorted({question_type(one.question) for one in said})
    }
    return scores, said


def ask_pope(
    asked: EvaluatedModel, subsets: Mapping[str, Sequence[YesNo]], settings: EvaluateSettings
) -> tuple[Scores, dict[str, list[Prediction]]]:
    """Ask a model yes-no questions about objects; one that stands in several subsets is asked once.

    Args:
        asked: The model.
        subsets: Name to its questions, at least one.
        settings: Limits.

    Returns:
        For each subset the scores with those of the controls, and every answer.
    """
    pairs = sorted({(q.image_id, q.question) for qs in subsets.values() for q in qs})
    image_ids = [image_id for image_id, _ in pairs]
    prompts = [question_text(question) for _, question in pairs]
    made = _ask(asked, image_ids, prompts, YES_NO_TOKENS, settings.batch_size)
    answers = dict(zip(pairs, _by_text(made), strict=True))
    said = {
        name: [_yes_no(q, answers[q.image_id, q.question]) for q in questions]
        for name, questions in subsets.items()
    }
    scores = {name: _pope_section(texts, asked.seed) for name, texts in said.items()}
    return scores, said


def _yes_no(question: YesNo, made: dict[str, Generation]) -> Prediction:
    right = yes_or_no(made[SEEN].text) == question.label
    return Prediction(question.image_id, question.question, (question.label,), made, float(right))


def _answer_score(target: str, answer: str) -> float:
    return exact_match(target, answer) if is_short(target) else token_f1(target, answer)


def _ask(
    asked: EvaluatedModel,
    image_ids: list[int],
    prompts: Sequence[str],
    max_tokens: int,
    batch_size: int,
) -> dict[str, list[Generation]]:
    made = {}
    for view in conditions(asked, image_ids):
        decides = {
            "model": asked.identity,
            "view": view.name,
            "image_ids": view.image_ids,
            "prompts": prompts,
            "max_tokens": max_tokens,
            "batch_size": batch_size,
        }
        make = functools.partial(
            generate,
            view.model,
            asked.tokenizer,
            view.features,
            view.image_ids,
            prompts,
            max_tokens=max_tokens,
            batch_size=batch_size,
            description=f"{asked.name}, {view.name}",
        )
        made[view.name] = cached(decides, make)
    return made


def _answer_section(said: Sequence[Prediction], seed: int) -> Scores:
    targets = [one.targets[0] for one in said]
    scores = _section(
        _made(said),
        [one.image_id for one in said],
        lambda texts: answer_measures(targets, texts),
        seed,
    )
    return scores | {"short_count": sum(map(is_short, targets))}


def _pope_section(said: Sequence[Prediction], seed: int) -> Scores:
    labels = [one.targets[0] for one in said]
    image_ids = [one.image_id for one in said]
    return _section(_made(said), image_ids, lambda texts: pope_measures(labels, texts), seed)


def _section(made: Made, image_ids: Sequence[int], measures_of: MeasuresOf, seed: int) -> Scores:
    """Score every way of asking: that with the own features, the controls inside of it."""
    sections = {
        view: _scored({**measures_of(_texts(texts)), **form_measures(texts)}, image_ids, seed)
        for view, texts in made.items()
    }
    return sections[SEEN] | {control: sections[control] for control in CONTROLS}


def _scored(measures: Mapping[str, Measure], image_ids: Sequence[int], seed: int) -> Scores:
    values: Scores = {name: measure.value for name, measure in measures.items()}
    intervals = {name: measure.interval(image_ids, seed) for name, measure in measures.items()}
    return values | {"count": len(image_ids), "intervals": intervals}


def _texts(made: Sequence[Generation]) -> list[str]:
    return [one.text for one in made]


def _by_text(made: Made) -> list[dict[str, Generation]]:
    """Turn ways of asking with their texts into texts with their ways of asking."""
    rows = zip(*made.values(), strict=True)
    return [dict(zip(made, row, strict=True)) for row in rows]


def _made(said: Sequence[Prediction]) -> dict[str, list[Generation]]:
    return {view: [one.made[view] for one in said] for view in (SEEN, *CONTROLS)}
