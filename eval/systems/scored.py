"""Scores the texts of a system, as measures that have intervals over images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.texts import first_few
from eval.bootstrap import Measure, mean_of
from eval.metrics import caption_measures, mean_over_subsets, pope_measures
from eval.systems.coco_files import read_results
from eval.systems.files import NamedFile, refuse
from eval.systems.pope_files import LabelledQuestion, read_answers

WORDS = "words"
"""The measure of the mean length of a text, in words between white space."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of a system in one part of the references."""

    system: str
    part: str = ""
    """Subset of yes-no questions; empty for captions."""
    measures: Mapping[str, Measure]
    """Name of a score to the score; all have the same texts."""
    text_keys: Sequence[Any]
    """What each text is about: an image id, or subset and number of a question."""
    image_ids: Sequence[int]
    """The image of each text."""
    missing: Sequence[Any] = ()
    """Images or questions of the references without a text."""

    @property
    def count(self) -> int:
        """The number of texts."""
        return len(self.text_keys)

    def note(self) -> str:
        """Return a sentence about what the system left out, or nothing."""
        if not self.missing:
            return ""
        what = f"questions of subset {self.part}" if self.part else "images"
        return (
            f"{self.system}: scored on {self.count} of {self.count + len(self.missing)} {what}; "
            f"without a text: {first_few(self.missing)}"
        )


def score_results(
    path: Path, references: dict[int, list[str]], results: Sequence[NamedFile]
) -> list[Scored]:
    """Score the captions of systems against captions by people.

    Args:
        path: File of the references, for error texts.
        references: Image id to its captions.
        results: Files in COCO's results format.

    Raises:
        StageError: A file cannot be used, captions an image without references, or is empty.
    """
    return [_scored_captions(path, references, file) for file in results]


def score_answers(
    questions: Sequence[LabelledQuestion], answers: Sequence[NamedFile]
) -> list[list[Scored]]:
    """Score the answers of systems to POPE's questions.

    Returns:
        For each system its subsets, and their mean if there are several. A subset without any
        answer is left out of both.

    Raises:
        StageError: A file cannot be used, or answers no question.
    """
    images = {image: n for n, image in enumerate(sorted({q.image for q in questions}))}
    return [_scored_answers(questions, images, file) for file in answers]


def _scored_captions(path: Path, references: dict[int, list[str]], file: NamedFile) -> Scored:
    results = read_results(file.path)
    if extra := sorted(results.keys() - references.keys()):
        refuse(file.path, f"captions images that {path} has no captions of: {first_few(extra)}")
    if not results:
        refuse(file.path, f"captions none of the {len(references)} images of {path}")
    image_ids = sorted(results)
    measures = caption_measures({i: references[i] for i in image_ids}, results)
    return Scored(
        system=file.name,
        measures=_with_words(measures, [results[i] for i in image_ids]),
        text_keys=image_ids,
        # Numbers of their own: an array would round ids beyond 64 bits.
        image_ids=range(len(image_ids)),
        missing=sorted(references.keys() - results.keys()),
    )


def _scored_answers(
    questions: Sequence[LabelledQuestion], images: Mapping[str, int], file: NamedFile
) -> list[Scored]:
    answers = read_answers(file.path, questions)
    if not answers:
        refuse(file.path, f"answers none of the {len(questions)} questions")
    parts = []
    for subset in dict.fromkeys(question.subset for question in questions):
        of_subset = [question for question in questions if question.subset == subset]
        answered = [question for question in of_subset if question.key in answers]
        if not answered:
            continue
        texts = [answers[question.key] for question in answered]
        measures = pope_measures([question.label for question in answered], texts)
        parts.append(
            Scored(
                system=file.name,
                part=subset,
                measures=_with_words(measures, texts),
                text_keys=[question.key for question in answered],
                image_ids=[images[question.image] for question in answered],
                missing=[q.question_id for q in of_subset if q.key not in answers],
            )
        )
    return [*parts, _mean(parts)] if len(parts) > 1 else parts


def _mean(parts: Sequence[Scored]) -> Scored:
    """Return the mean of each score over subsets: the figure that papers call POPE."""
    names = parts[0].measures
    return Scored(
        system=parts[0].system,
        part=f"mean of {len(parts)}",
        measures={n: mean_over_subsets([part.measures[n] for part in parts]) for n in names},
        text_keys=[key for part in parts for key in part.text_keys],
        image_ids=[image_id for part in parts for image_id in part.image_ids],
    )


def _with_words(measures: Mapping[str, Measure], texts: Sequence[str]) -> dict[str, Measure]:
    return {WORDS: mean_of([float(len(text.split())) for text in texts]), **measures}
