"""The tables of the page: all numbers, answers by type, yes/no questions, contamination.

A cell is a tuple of texts: the value, then what is written small beneath it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.report.scores import (
    LABELS,
    METRICS,
    Section,
    by_condition,
    measured,
    measured_by_condition,
    pope_sections,
    section_of,
    titled_sections,
)
from eval.scoring.score_names import BLIND, SEEN

LISTED = 50
"""Images of a kind that are named as contaminated; the rest are counted."""

_KINDS = {"captions": "Captions", "answers": "Answers", "pope": "Yes or no"}

Cell = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row: its name, what that means, its cells."""

    name: str
    meaning: str = ""
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table; the first column has the names of the rows."""

    title: str
    first: str
    columns: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Contaminated:
    """Images of one kind that lie in training too."""

    title: str
    named: Sequence[Mapping[str, Any]]
    """The first ones as `reports/contamination.json` has them: image id, file name, reason."""
    more: int


def score_tables(scores: Section) -> list[Table]:
    """Return every number, a table a kind; what was not scored is left out."""
    return [_all_views(title, section) for title, section in titled_sections(scores).items()]


def type_table(scores: Section) -> Table | None:
    """Return the answers by type of question, the most frequent first."""
    types = section_of(scores, "answers").get("by_type") or {}
    parts = {name: section_of(types, name) for name in types}
    frequent = sorted(parts, key=lambda name: (-parts[name].get("count", 0), name))
    counts, keys = ("count", "short_count"), ("exact_match", "token_f1", "ROUGE-L")
    rows = [
        Row(
            name=name,
            cells=[
                *(_count(parts[name], key) for key in counts),
                *(_beside_blind(parts[name], key) for key in keys),
            ],
        )
        for name in frequent
        if parts[name]
    ]
    columns = ["Questions", *(METRICS[key].label for key in ("short_count", *keys))]
    title = "Answers by type of question"
    return Table(title=title, first="Type", columns=columns, rows=rows) if rows else None


def pope_table(scores: Section) -> Table | None:
    """Return the yes/no questions, a row a subset."""
    keys = ("accuracy", "precision", "recall", "f1", "yes_rate")
    rows = [
        Row(name=name, cells=[_count(part), *(_beside_blind(part, key) for key in keys)])
        for name, part in pope_sections(scores).items()
    ]
    columns = ["Questions", *(METRICS[key].label for key in keys)]
    title = "Yes or no questions"
    return Table(title=title, first="Subset", columns=columns, rows=rows) if rows else None


def contamination_table(scores: Section) -> Table | None:
    """Return how many images of each kind lie in training too, and how many were left out."""
    counts = scores.get("contamination") or {}
    rows = [
        Row(
            name=_KINDS.get(kind, kind),
            cells=[
                (METRICS["count"].written(of_kind.get(key)),)
                for key in ("images", "contaminated", "left_out")
            ],
        )
        for kind, of_kind in counts.items()
    ]
    columns = ["Images", "In training too", "Left out"]
    return Table(title="Contamination", first="Kind", columns=columns, rows=rows) if rows else None


def still_scored(scores: Section) -> int:
    """Return how many images were scored although they lie in training too."""
    counts = (scores.get("contamination") or {}).values()
    return sum(of_kind["contaminated"] - of_kind["left_out"] for of_kind in counts)


def contaminated_images(
    contamination: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Contaminated]:
    """Return the images to name, kinds without any left out."""
    return [
        Contaminated(
            title=_KINDS.get(kind, kind),
            named=images[:LISTED],
            more=max(len(images) - LISTED, 0),
        )
        for kind, images in contamination.items()
        if images
    ]


def _all_views(title: str, section: Section) -> Table:
    views = by_condition(section)
    rows = []
    for key in [key for key in METRICS if any(key in values for values in views.values())]:
        found = measured_by_condition(section, key).values()
        cells = [(m.written, m.interval) if m.interval else (m.written,) for m in found]
        rows.append(Row(name=METRICS[key].label, meaning=METRICS[key].meaning, cells=cells))
    return Table(title=title, first="Metric", columns=[LABELS[v].column for v in views], rows=rows)


def _count(section: Section, key: str = "count") -> Cell:
    return (METRICS[key].written(section.get(key)),)


def _beside_blind(section: Section, key: str) -> Cell:
    views = measured_by_condition(section, key)
    seen, blind = views[SEEN], views.get(BLIND) or measured({}, key)
    lines = (seen.written, seen.interval, f"wrong image {blind.written}")
    return tuple(line for line in lines if line)
