"""Generates texts under all conditions and scores them, section by section of `eval.json`.

A section holds the scores with the images' own features; under the name of each control it holds
the control's scores, and under `gains` how much better the scores are than the control's.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from eval.bootstrap import Measure, mean_of
from eval.metrics import (
    caption_measures,
    cider_by_image,
    pope_mean_measures,
    pope_measures,
    yes_or_no,
)
from eval.scoring.answers import answer_measures, answer_score, form_measures, is_short
from eval.scoring.budget import UNLIMITED, Budget
from eval.scoring.conditions import Condition, make_conditions
from eval.scoring.evaluated_models import EvaluatedModel
from eval.scoring.generation_cache import cached
from eval.scoring.losses import Losses
from eval.scoring.predictions import Prediction
from eval.scoring.score_names import CONTROLS, GAINS, NO_BETTER_SIDE, SEEN
from eval.scoring.yes_no import YesNo
from eval.settings import EvaluateSettings
from train.data.examples import Question
from train.model.generate import Generation, generate

YES_NO_TOKENS = 16
"""Most tokens of a yes-no answer, of which the first sentence alone counts."""

EMPTY_SCORES: dict[str, Any] = {"count": 0, **{control: {"count": 0} for control in CONTROLS}}
"""The section of a kind without any question."""

Scores = dict[str, Any]


def caption_images(
    model: EvaluatedModel,
    references: dict[int, list[str]],
    split: str,
    question: str | None,
    settings: EvaluateSettings,
    budget: Budget = UNLIMITED,
) -> tuple[Scores, list[Prediction]]:
    """Let a model caption images.

    Args:
        model: The model.
        references: Image id to the captions by people.
        split: Of the images.
        question: The request for a caption; None for a model that captions without any.
        settings: Limits.
        budget: Limits the images.

    Returns:
        The section of scores, and the captions.
    """
    if not references:
        return EMPTY_SCORES, []
    chosen = sorted(references)
    asked = [question] * len(chosen)
    by_number = _generate(model, chosen, asked, settings.caption_tokens, settings, budget)
    image_ids, generations = [chosen[n] for n in by_number], list(by_number.values())
    references = {image_id: references[image_id] for image_id in image_ids}

    def by_image(texts: Sequence[str]) -> dict[int, str]:
        return dict(zip(image_ids, texts, strict=True))

    cider = cider_by_image(references, by_image([texts[SEEN].text for texts in generations]))
    captions = [
        Prediction(
            model=model.name,
            kind="caption",
            image_id=image_id,
            split=split,
            question=question or "",
            targets=tuple(references[image_id]),
            generations=texts,
            score=cider[image_id],
        )
        for image_id, texts in zip(image_ids, generations, strict=True)
    ]

    def measures_of(texts: Sequence[str]) -> dict[str, Measure]:
        words = mean_of([float(len(text.split())) for text in texts])
        return {**caption_measures(references, by_image(texts)), "mean_words": words}

    section = _section(captions, measures_of, model.seed)
    return section | budget.reached(image_ids, chosen), captions


def answer_questions(
    model: EvaluatedModel,
    questions: Sequence[Question],
    losses: Mapping[str, Losses],
    settings: EvaluateSettings,
    budget: Budget = UNLIMITED,
) -> tuple[Scores, list[Prediction]]:
    """Let a model answer held-out questions, each without the turns before it.

    Args:
        model: The model.
        questions: The questions.
        losses: Condition to the losses of the right answers.
        settings: Limits.
        budget: Limits the images.

    Returns:
        The section of scores, with a section for each type of question, and the answers.
    """
    if not questions:
        return EMPTY_SCORES, []
    chosen = {question.image_id for question in questions}
    if budget.is_limited and losses:
        # Losses and texts are about the same images: those that both reached.
        questions = [q for q in questions if q.image_id in set(losses[SEEN].image_ids)]
    image_ids = [question.image_id for question in questions]
    asked = [question.question for question in questions]
    by_number = _generate(model, image_ids, asked, settings.answer_tokens, settings, budget)
    answers = [
        Prediction(
            model=model.name,
            kind="answer",
            image_id=question.image_id,
            split="holdout",
            question=question.question,
            targets=(question.answer,),
            generations=texts,
            score=answer_score(question.answer, texts[SEEN].text),
        )
        for question, texts in ((questions[n], texts) for n, texts in by_number.items())
    ]
    reached = {answer.image_id for answer in answers}
    if budget.is_limited:
        losses = {condition: loss.only(reached) for condition, loss in losses.items()}
    section = _answer_section(answers, model.seed)
    for condition, loss in losses.items():
        part = section if condition == SEEN else section[condition]
        part["loss"] = loss.measure.value
        part["intervals"]["loss"] = loss.measure.interval(loss.image_ids, model.seed)
        if condition != SEEN:
            # A lower loss is better.
            gain = loss.measure.gain_over(losses[SEEN].measure, loss.image_ids, model.seed)
            section[GAINS][condition]["loss"] = asdict(gain)
    section["by_type"] = {
        name: _answer_section([a for a in answers if a.question_type == name], model.seed)
        for name in sorted({answer.question_type for answer in answers})
    }
    return section | budget.reached(reached, chosen), answers


def answer_yes_no(
    model: EvaluatedModel,
    subsets: Mapping[str, Sequence[YesNo]],
    splits: Mapping[int, str],
    settings: EvaluateSettings,
    budget: Budget = UNLIMITED,
) -> tuple[dict[str, Scores], list[Prediction]]:
    """Let a model answer yes-no questions about objects.

    A question that stands in several subsets is answered once.

    Args:
        model: The model.
        subsets: Subset to its questions, at least one.
        splits: Image id to its split in the index.
        settings: Limits.
        budget: Limits the images.

    Returns:
        Subset to its section of scores, and the answers, subset by subset.
    """
    pairs = sorted({(q.image_id, q.question) for qs in subsets.values() for q in qs})
    if not pairs:
        return {}, []
    image_ids = [image_id for image_id, _ in pairs]
    asked = [question for _, question in pairs]
    by_number = _generate(model, image_ids, asked, YES_NO_TOKENS, settings, budget)
    by_pair = {pairs[number]: texts for number, texts in by_number.items()}

    def answer(subset: str, question: YesNo) -> Prediction:
        texts = by_pair[question.image_id, question.question]
        return Prediction(
            model=model.name,
            kind="pope",
            subset=subset,
            image_id=question.image_id,
            split=splits.get(question.image_id, ""),
            question=question.question,
            targets=(question.label,),
            generations=texts,
            score=float(yes_or_no(texts[SEEN].text) == question.label),
        )

    def section(answers: Sequence[Prediction], questions: Sequence[YesNo]) -> Scores:
        reached = budget.reached((a.image_id for a in answers), (q.image_id for q in questions))
        return _yes_no_section(answers, model.seed) | reached

    asked_of = {
        name: [answer(name, q) for q in questions if (q.image_id, q.question) in by_pair]
        for name, questions in subsets.items()
    }
    answers = {name: of_subset for name, of_subset in asked_of.items() if of_subset}
    sections = {name: section(of_subset, subsets[name]) for name, of_subset in answers.items()}
    return sections, [answer for of_subset in answers.values() for answer in of_subset]


def mean_of_subsets(answers: Sequence[Prediction], seed: int) -> Scores:
    """Return the section of the mean of each yes-no score over the subsets.

    The mean F1 of POPE's three subsets is what papers call POPE. The interval draws an image with
    its questions of all subsets.

    Args:
        answers: Answers to yes-no questions, each subset's together.
        seed: Seed of the intervals.

    Returns:
        The section, with the names of the subsets.
    """
    if not answers:
        return EMPTY_SCORES | {"subsets": []}
    subsets = [answer.subset for answer in answers]
    labels = [answer.targets[0] for answer in answers]
    measures_of = functools.partial(pope_mean_measures, subsets, labels)
    return _section(answers, measures_of, seed) | {"subsets": list(dict.fromkeys(subsets))}


def _generate(
    model: EvaluatedModel,
    image_ids: Sequence[int],
    questions: Sequence[str | None],
    max_tokens: int,
    settings: EvaluateSettings,
    budget: Budget,
) -> dict[int, dict[str, Generation]]:
    """Generate a text for each question under each condition, or take it from the cache.

    Returns:
        Number of a question to its texts by condition, in order, of the images that were reached.
    """
    conditions = make_conditions(model, image_ids)
    generations: dict[int, dict[str, Generation]] = {}
    for part in budget.parts(image_ids, settings.batch_size):
        numbers = [number for number, image_id in enumerate(image_ids) if image_id in part]
        asked = [questions[number] for number in numbers]
        by_condition = {
            condition.name: _texts(model, condition.only(numbers), asked, max_tokens, settings)
            for condition in conditions
        }
        rows = zip(*by_condition.values(), strict=True)
        texts = (dict(zip(by_condition, row, strict=True)) for row in rows)
        generations |= zip(numbers, texts, strict=True)
    return dict(sorted(generations.items()))


def _texts(
    model: EvaluatedModel,
    condition: Condition,
    questions: Sequence[str | None],
    max_tokens: int,
    settings: EvaluateSettings,
) -> list[Generation]:
    """Generate the texts of one condition, or take them from the cache."""
    cache_key = {
        "model": model.identity,
        "condition": condition.name,
        "weights": condition.weights,
        "image_ids": condition.image_ids,
        "questions": questions,
        "max_tokens": max_tokens,
        "batch_size": settings.batch_size,
    }
    make = functools.partial(
        generate,
        condition.model,
        model.prompt_format,
        condition.features,
        condition.image_ids,
        questions,
        max_tokens=max_tokens,
        batch_size=settings.batch_size,
        description=f"{model.name}, {condition.name}",
    )
    with condition.active():
        return cached(cache_key, make)


def _answer_section(answers: Sequence[Prediction], seed: int) -> Scores:
    targets = [answer.targets[0] for answer in answers]
    section = _section(answers, lambda texts: answer_measures(targets, texts), seed)
    return section | {"short_count": sum(map(is_short, targets))}


def _yes_no_section(answers: Sequence[Prediction], seed: int) -> Scores:
    labels = [answer.targets[0] for answer in answers]
    return _section(answers, lambda texts: pope_measures(labels, texts), seed)


def _section(
    predictions: Sequence[Prediction],
    measures_of: Callable[[Sequence[str]], Mapping[str, Measure]],
    seed: int,
) -> Scores:
    """Score predictions under every condition, and take the gains over each control.

    Args:
        predictions: At least one.
        measures_of: Scores the texts of one condition, in the order of the predictions.
        seed: Seed of the intervals.
    """
    image_ids = [prediction.image_id for prediction in predictions]

    def measured(condition: str) -> dict[str, Measure]:
        generations = [prediction.generations[condition] for prediction in predictions]
        return {**measures_of([g.text for g in generations]), **form_measures(generations)}

    def scored(measures: Mapping[str, Measure]) -> Scores:
        values = {name: measure.value for name, measure in measures.items()}
        intervals = {name: measure.interval(image_ids, seed) for name, measure in measures.items()}
        return values | {"count": len(image_ids), "intervals": intervals}

    def gains_over(control: str) -> Scores:
        others = measures[control]
        return {
            name: asdict(measure.gain_over(others[name], image_ids, seed))
            for name, measure in measures[SEEN].items()
            if name not in NO_BETTER_SIDE
        }

    measures = {condition: measured(condition) for condition in predictions[0].generations}
    sections = {condition: scored(of_condition) for condition, of_condition in measures.items()}
    gains = {control: gains_over(control) for control in sections if control != SEEN}
    return sections.pop(SEEN) | sections | {GAINS: gains}
