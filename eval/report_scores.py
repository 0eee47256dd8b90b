"""Words and tables for the scores of `reports/eval.json`: names, units, verdicts.

A score counts only against its blind control, the same questions with the features of another
image: what a model reaches without the picture it has not learned from pictures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

MARGIN = 0.02
"""Share of the blind score by which a score must be better; less is taken for noise."""

Section = Mapping[str, Any]
Style = Literal["number", "share", "length", "count"]
State = Literal["good", "bad", "open"]

_DECIMALS = {"number": 3, "length": 1, "count": 0}


@dataclass(frozen=True)
class Metric:
    """How one key of a section is named, explained and written."""

    label: str
    meaning: str
    style: Style = "number"
    lower_is_better: bool = False

    def written(self, value: object) -> str:
        """Write a value with its unit, or a dash where there is none."""
        number = as_number(value)
        if number is None:
            return "\u2013"
        if self.style == "share":
            return f"{number:.1%}"
        return f"{number:,.{_DECIMALS[self.style]}f}"


METRICS = {
    "CIDEr": Metric("CIDEr", "agreement with what people wrote; 1.000 is 100 in papers"),
    "BLEU-1": Metric("BLEU-1", "share of words that people used"),
    "BLEU-2": Metric("BLEU-2", "the same for word pairs"),
    "BLEU-3": Metric("BLEU-3", "for runs of three words"),
    "BLEU-4": Metric("BLEU-4", "for runs of four words"),
    "ROUGE-L": Metric("ROUGE-L", "longest common sequence of words"),
    "exact_match": Metric("Exact answers", "same words as the target", "share"),
    "token_f1": Metric("Token F1", "overlap with the words of the target", "share"),
    "loss": Metric(
        "Loss", "per token of the target, in nats; lower is better", lower_is_better=True
    ),
    "stop_rate": Metric("Stop rate", "texts that end by themselves", "share"),
    "repeated_4grams": Metric("Repeated 4-grams", "of all runs of four words", "share"),
    "mean_tokens": Metric("Mean length", "in tokens", "length"),
    "count": Metric("Texts", "that were scored", "count"),
}


_VERDICTS: dict[bool | None, tuple[State, str]] = {
    True: ("good", "Beats the blind control."),
    False: (
        "bad",
        "Does NOT beat the blind control: it has learned nothing from the pictures.",
    ),
    None: ("open", "Cannot be judged: the score or its blind control was not measured."),
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """One score beside its blind control; widths are percent of the longer bar."""

    title: str
    metric: Metric
    score: str
    blind: str
    score_width: float
    blind_width: float
    verdict: str
    state: State


@dataclass(frozen=True, kw_only=True)
class Table:
    """Scores of one kind; each row holds a metric and its written values."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[Metric, Sequence[str]]]


def score_cards(scores: Section) -> list[Card]:
    """Return the summary cards of the scores that were measured."""
    wanted = (
        ("Captions", ("captions",), "CIDEr"),
        ("Answers", ("answers",), "token_f1"),
        ("Answers", ("answers",), "exact_match"),
        ("Answers", ("answers",), "loss"),
        ("Captions after stage 1 alone", ("pretrain_only", "captions"), "CIDEr"),
    )
    sections = ((title, section_of(scores, *path), key) for title, path, key in wanted)
    return [_card(title, section, key) for title, section, key in sections if key in section]


def score_tables(scores: Section) -> list[Table]:
    """Return one table of captions and one of answers, each left out if nothing was scored."""
    captions, answers = section_of(scores, "captions"), section_of(scores, "answers")
    stage1 = section_of(scores, "pretrain_only", "captions")
    tables = (
        _table("Captions", {"Both stages": captions, "Stage 1 alone": stage1}),
        _table("Answers", {"Both stages": answers}),
    )
    return [table for table in tables if table.rows]


def section_of(scores: Section, *path: str) -> Section:
    """Return a section of the scores, empty if it is absent or counts no text."""
    section: Any = scores
    for name in path:
        section = section.get(name) or {}
    return section if section.get("count", 1) else {}


def beats_blind(metric: Metric, score: object, blind: object) -> bool | None:
    """Say whether a score is better than its blind control by more than the margin.

    Returns:
        None if either was not measured.
    """
    reached, control = as_number(score), as_number(blind)
    if reached is None or control is None:
        return None
    gain = control - reached if metric.lower_is_better else reached - control
    return gain > MARGIN * abs(control)


def as_number(value: object) -> float | None:
    """Return a value that was measured as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _card(title: str, section: Section, key: str) -> Card:
    metric, score, blind = METRICS[key], section[key], _blind(section).get(key)
    longest = max(as_number(score) or 0.0, as_number(blind) or 0.0) or 1.0
    state, verdict = _VERDICTS[beats_blind(metric, score, blind)]
    return Card(
        title=title,
        metric=metric,
        score=metric.written(score),
        blind=metric.written(blind),
        score_width=100 * (as_number(score) or 0.0) / longest,
        blind_width=100 * (as_number(blind) or 0.0) / longest,
        verdict=verdict,
        state=state,
    )


def _table(title: str, runs: Mapping[str, Section]) -> Table:
    columns: dict[str, Section] = {}
    for name, section in runs.items():
        if section:
            columns |= {name: section, f"{name}, blind": _blind(section)}
    keys = [key for key in METRICS if any(key in section for section in columns.values())]
    rows = [
        (METRICS[key], [METRICS[key].written(section.get(key)) for section in columns.values()])
        for key in keys
    ]
    return Table(title=title, columns=list(columns), rows=rows)


def _blind(section: Section) -> Section:
    return section.get("blind") or {}
