"""Chooses the texts that the page shows: the best, the worst, and some at random."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.scoring.predictions import Kind, Prediction
from eval.scoring.score_names import BLIND

GROUP_SIZE = 24
"""Most texts of a group; with the pictures of all groups the page has a few megabytes."""

KIND_TITLES: dict[Kind, str] = {"caption": "Captions", "answer": "Answers", "pope": "Yes or no"}
"""Kind of text to its title, in the order of the page."""


@dataclass(frozen=True, kw_only=True)
class GalleryText:
    """One text of the model beside its targets."""

    image_id: int
    kind: Kind
    split: str
    question: str
    """Empty for a caption."""
    question_type: str
    """Type of a question, subset of a yes-no question, empty for a caption."""
    targets: tuple[str, ...]
    prediction: str
    blind_prediction: str
    """The text for the same question with the features of another image."""
    score: float
    num_tokens: int
    """Length of the prediction."""
    stopped: bool
    """Whether the prediction ended by itself; else it was cut at the limit."""
    right_without_sight: bool | None = None
    """See `Prediction`."""


Gallery = dict[str, list[GalleryText]]
"""Name of a group to its texts."""


def gallery_texts(predictions: Sequence[Prediction], model: str) -> list[GalleryText]:
    """Return the texts of a model as the page shows them."""
    return [
        GalleryText(
            image_id=prediction.image_id,
            kind=prediction.kind,
            split=prediction.split,
            question="" if prediction.kind == "caption" else prediction.question,
            question_type=prediction.subset or prediction.question_type,
            targets=prediction.targets,
            prediction=prediction.seen.text,
            blind_prediction=prediction.generations[BLIND].text,
            score=prediction.score,
            num_tokens=prediction.seen.num_tokens,
            stopped=prediction.seen.stopped,
            right_without_sight=prediction.right_without_sight,
        )
        for prediction in predictions
        if prediction.model == model
    ]


def choose_examples(texts: Sequence[GalleryText]) -> dict[Kind, Gallery]:
    """Choose the texts of the galleries: the best, the worst and a random choice of the others.

    No text is shown twice. Among equal scores the choice is random too, the same for the same
    texts.

    Returns:
        Kind to its groups in the order of the page; empty groups are left out.
    """
    return {kind: _gallery([text for text in texts if text.kind == kind]) for kind in KIND_TITLES}


def gallery_image_ids(texts: Sequence[GalleryText]) -> set[int]:
    """Return the images whose pictures the galleries show."""
    return {text.image_id for text in _all_texts(choose_examples(texts))}


def filter_options(galleries: Mapping[Kind, Gallery]) -> dict[str, list[tuple[str, str]]]:
    """Return the filters of the page.

    Returns:
        Property of a text to the values that occur, each with its title.
    """
    shown = _all_texts(galleries)
    groups = {name: name for gallery in galleries.values() for name in gallery}
    return {
        "kind": [(kind, KIND_TITLES[kind]) for kind, gallery in galleries.items() if gallery],
        "group": list(groups.items()),
        "split": [(split, split) for split in sorted({text.split for text in shown})],
        "type": [(name, name) for name in sorted({text.question_type for text in shown} - {""})],
    }


def _all_texts(galleries: Mapping[Kind, Gallery]) -> list[GalleryText]:
    return [text for gallery in galleries.values() for group in gallery.values() for text in group]


def _gallery(texts: Sequence[GalleryText]) -> Gallery:
    ranked = sorted(texts, key=lambda text: (-text.score, _random_key(text)))
    half = (len(ranked) + 1) // 2
    best = ranked[: min(GROUP_SIZE, half)]
    worst = ranked[max(len(ranked) - GROUP_SIZE, half) :][::-1]
    others = ranked[len(best) : len(ranked) - len(worst)]
    some = sorted(others, key=_random_key)[:GROUP_SIZE]
    groups = {"Worst": worst, "Best": best, "At random": some}
    return {name: group for name, group in groups.items() if group}


def _random_key(text: GalleryText) -> bytes:
    """Return a sort key that depends on the question alone, and not on the answer."""
    question = f"{text.image_id}\n{text.question_type}\n{text.question}"
    return hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()
