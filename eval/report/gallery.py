"""What the page shows of the model's texts: the best, the worst, and some at random."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

GROUP_SIZE = 24
"""Most examples of a group; with the pictures of all groups the page has a few megabytes."""

Kind = Literal["caption", "answer", "pope"]

KINDS: dict[Kind, str] = {"caption": "Captions", "answer": "Answers", "pope": "Yes or no"}
"""The kinds of examples in the order of the page, and their titles."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One text of the model beside what was wanted."""

    image_id: int
    kind: Kind
    split: str
    question: str
    """Empty for a caption."""
    question_type: str
    """The type of a question, the subset of a yes/no question, empty for a caption."""
    targets: tuple[str, ...]
    prediction: str
    blind_prediction: str
    """The text for the same question with the features of another image."""
    score: float
    num_tokens: int
    """Length of the prediction."""
    stopped: bool
    """Whether the prediction ended by itself, or was cut at the limit."""


Gallery = dict[str, list[Example]]


def choose_examples(examples: Sequence[Example]) -> dict[Kind, Gallery]:
    """Choose what the galleries show: the best, the worst and some of the others at random.

    No example is shown twice. Of equal scores, those shown are a random choice too, the same for
    the same examples.

    Returns:
        For each kind of example, its groups in the order of the page; empty groups are left out.
    """
    return {kind: _gallery([e for e in examples if e.kind == kind]) for kind in KINDS}


def gallery_image_ids(examples: Sequence[Example]) -> set[int]:
    """Return the images whose pictures the galleries show."""
    galleries = choose_examples(examples).values()
    return {e.image_id for gallery in galleries for group in gallery.values() for e in group}


def filter_options(galleries: Mapping[Kind, Gallery]) -> dict[str, list[tuple[str, str]]]:
    """Return what the page can be filtered by.

    Returns:
        For each property of an example, the values that occur, each with its title.
    """
    shown = [e for gallery in galleries.values() for group in gallery.values() for e in group]
    groups = {name: name for gallery in galleries.values() for name in gallery}
    return {
        "kind": [(kind, KINDS[kind]) for kind, gallery in galleries.items() if gallery],
        "group": list(groups.items()),
        "split": [(split, split) for split in sorted({e.split for e in shown})],
        "type": [(name, name) for name in sorted({e.question_type for e in shown} - {""})],
    }


def _gallery(examples: Sequence[Example]) -> Gallery:
    ranked = sorted(examples, key=lambda e: (-e.score, _drawn(e)))
    half = (len(ranked) + 1) // 2
    best = ranked[: min(GROUP_SIZE, half)]
    worst = ranked[max(len(ranked) - GROUP_SIZE, half) :][::-1]
    others = ranked[len(best) : len(ranked) - len(worst)]
    some = sorted(others, key=_drawn)[:GROUP_SIZE]
    groups = {"Worst": worst, "Best": best, "At random": some}
    return {name: group for name, group in groups.items() if group}


def _drawn(example: Example) -> bytes:
    """Return an order that says nothing about the example."""
    text = f"{example.image_id}\n{example.question_type}\n{example.question}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
