"""The tables of the page: all scores, answers by type of question, yes/no questions, contamination.

A cell is a tuple of texts: the value, then the small lines beneath it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.report.scores import (
    LABELS,
    METRICS,
    Section,
    by_condition,
    gain_over,
    gain_text,
    measured,
    measured_by_condition,
    metric_of,
    pope_sections,
    section_of,
    titled_sections,
)
from eval.scoring.budget import of_images
from eval.scoring.score_names import BLIND, SEEN

SECTION_TITLES = {"captions": "Captions", "answers": "Answers", "pope": "Yes or no"}

Cell = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a table: a name, its meaning, and the cells."""

    name: str
    meaning: str = ""
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; its first column holds the names of the rows."""

    title: str
    first: str
    columns: Sequence[str]
    rows: Sequence[Row]


def score_tables(scores: Section) -> list[Table]:
    """Return all scores of the model and its controls, a table for each section."""
    sections = titled_sections(scores).items()
    return [_score_table(_with_split(title, scores), section) for title, section in sections]


def _with_split(title: str, scores: Section) -> str:
    """Return the title of a section, of captions with the split of their images."""
    split = scores.get("split")
    if not split or not title.startswith("Captions"):
        return title
    return f"{title}: {split['name']}, split {split['captions']}"


def type_table(scores: Section) -> Table | None:
    """Return the scores of answers by type of question, the most frequent type first."""
    types = section_of(scores, "answers").get("by_type") or {}
    parts = {name: section_of(types, name) for name in types}
    frequent = sorted(parts, key=lambda name: (-parts[name].get("count", 0), name))
    return _parts_table(
        "Answers by type of question",
        f"Type{of_images(section_of(scores, 'answers'))}",
        {name: parts[name] for name in frequent if parts[name]},
        ("count", "short_count"),
        ("exact_match", "token_f1", "ROUGE-L"),
    )


def pope_table(scores: Section) -> Table | None:
    """Return the scores of yes/no questions, a row for each subset, and one for their mean."""
    keys = ("accuracy", "precision", "recall", "f1", "yes_rate")
    parts = {name + of_images(part): part for name, part in pope_sections(scores).items()}
    if len(parts) > 1 and (mean := section_of(scores, "pope_mean")):
        parts[f"mean of {len(parts)}{of_images(mean)}"] = mean
    return _parts_table("Yes/no questions", "Subset", parts, ("count",), keys)


def contamination_table(scores: Section) -> Table | None:
    """Return for each kind of text how many images are also in the training data."""
    counts = scores.get("contamination") or {}
    keys = ("images", "contaminated", "left_out")
    rows = [
        Row(
            name=SECTION_TITLES.get(kind, kind),
            cells=[(metric_of("count").written(of_kind.get(key)),) for key in keys],
        )
        for kind, of_kind in counts.items()
    ]
    columns = ["Images", "Also in training", "Left out"]
    return Table(title="Contamination", first="Kind", columns=columns, rows=rows) if rows else None


def still_scored(scores: Section) -> int:
    """Return how many images were scored although they are in the training data."""
    counts = (scores.get("contamination") or {}).values()
    return sum(of_kind["contaminated"] - of_kind["left_out"] for of_kind in counts)


def _score_table(title: str, section: Section) -> Table:
    conditions = by_condition(section)
    rows = []
    # Every score has an interval; one that METRICS does not list comes last, under its own key.
    for key in dict.fromkeys([*METRICS, *section.get("intervals", {})]):
        if any(key in values for values in conditions.values()):
            metric = metric_of(key)
            found = measured_by_condition(section, key).values()
            model, *controls = (
                (m.written, m.interval) if m.interval else (m.written,) for m in found
            )
            cells = [model, _gain(section, key), *controls]
            rows.append(Row(name=metric.label, meaning=metric.meaning, cells=cells))
    columns = [LABELS[name].column for name in conditions]
    columns.insert(1, "Gain over wrong image")
    return Table(title=title, first="Metric", columns=columns, rows=rows)


def _gain(section: Section, key: str) -> Cell:
    gain = gain_over(section, key, BLIND)
    if gain is None:
        return ("",)
    text = gain_text(metric_of(key), gain)
    return text.value, text.interval, text.p


def _parts_table(
    title: str,
    first: str,
    parts: Mapping[str, Section],
    counts: Sequence[str],
    keys: Sequence[str],
) -> Table | None:
    """Return counts and scores of some parts; the first count is the number of questions."""
    rows = [
        Row(
            name=name,
            cells=[
                *((metric_of(key).written(part.get(key)),) for key in counts),
                *(_beside_wrong_image(part, key) for key in keys),
            ],
        )
        for name, part in parts.items()
    ]
    columns = ["Questions", *(metric_of(key).label for key in (*counts[1:], *keys))]
    return Table(title=title, first=first, columns=columns, rows=rows) if rows else None


def _beside_wrong_image(section: Section, key: str) -> Cell:
    conditions = measured_by_condition(section, key)
    model, control = conditions[SEEN], conditions.get(BLIND) or measured({}, key)
    lines = (model.written, model.interval, f"wrong image {control.written}")
    return tuple(line for line in lines if line)
