"""The scores of `reports/eval.json` as the page reads them: names, units, intervals, comparisons.

A score counts only against its controls, the same questions without what the model needs to know of
the picture: what it reaches without, it has not learned from pictures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Section = Mapping[str, Any]
Style = Literal["number", "share", "length", "count"]

_DECIMALS = {"number": 3, "length": 1, "count": 0}
_DASH = "\u2013"


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
            return _DASH
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
    "exact_match": Metric(
        "Exact match", "same words as the target, of at most five words", "share"
    ),
    "token_f1": Metric("Token F1", "overlap with the words of the target", "share"),
    "loss": Metric(
        "Loss", "per token of the target, in nats; lower is better", lower_is_better=True
    ),
    "accuracy": Metric("Accuracy", "yes and no answered rightly", "share"),
    "precision": Metric("Precision", "of what it said is there, how much is", "share"),
    "recall": Metric("Recall", "of what is there, how much it said is", "share"),
    "f1": Metric("F1", "harmonic mean of precision and recall", "share"),
    "yes_rate": Metric("Yes-rate", "questions answered with yes", "share"),
    "stop_rate": Metric("Stop rate", "texts that end by themselves", "share"),
    "repeated_4grams": Metric("Repeated 4-grams", "of all runs of four words", "share"),
    "mean_tokens": Metric("Mean length", "in tokens", "length"),
    "short_count": Metric("Short targets", "that exact match is over", "count"),
    "count": Metric("Texts", "that were scored", "count"),
}

CONTROLS = {
    "blind": "blind control",
    "noise": "noise control",
    "untrained": "untrained projector",
}
"""Key of each control in a section, and what it is called."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One score with its 95 % interval, each as far as it was measured."""

    metric: Metric
    value: float | None
    low: float | None
    high: float | None

    @property
    def written(self) -> str:
        """The value with its unit, or a dash."""
        return self.metric.written(self.value)

    @property
    def interval(self) -> str:
        """The ends of the interval, or nothing."""
        if self.low is None or self.high is None:
            return ""
        low, high = self.metric.written(self.low), self.metric.written(self.high)
        return f"{low.removesuffix('%')}{_DASH}{high}"

    def beats(self, control: "Measured") -> bool | None:
        """Say whether the intervals lie apart, this one on the better side.

        Returns:
            None if an interval was not measured.
        """
        if None in (self.low, self.high, control.low, control.high):
            return None
        if self.metric.lower_is_better:
            return self.high < control.low  # type: ignore[operator]
        return self.low > control.high  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of a card; lengths and places are percent of the longest row."""

    label: str
    measured: Measured
    width: float
    low: float | None
    high: float | None


def section_of(scores: Section, *path: str) -> Section:
    """Return a section of the scores, empty if it is absent or counts no text."""
    section: Any = scores
    for name in path:
        section = section.get(name) or {}
    return section if section.get("count", 1) else {}


def pope_sections(scores: Section) -> dict[str, Section]:
    """Return the subsets of yes/no questions that were scored."""
    subsets = {name: section_of(scores, "pope", name) for name in scores.get("pope") or {}}
    return {name: section for name, section in subsets.items() if section}


def views_of(section: Section) -> dict[str, Section]:
    """Return what is beside one another: the scores under `seen`, and the controls there are."""
    controls = {view: section[view] for view in CONTROLS if section.get(view)}
    return {"seen": section, **controls}


def measured(section: Section, key: str) -> Measured:
    """Return one score of a view."""
    low, high = (section.get("intervals") or {}).get(key) or (None, None)
    return Measured(
        metric=METRICS[key],
        value=as_number(section.get(key)),
        low=as_number(low),
        high=as_number(high),
    )


def bars_of(section: Section, key: str) -> list[Bar]:
    """Return a bar for each view of a section; a share is measured against the whole."""
    views = {view: measured(values, key) for view, values in views_of(section).items()}
    ends = [end for m in views.values() for end in (m.value, m.high) if end is not None]
    longest = 1.0 if METRICS[key].style == "share" else max([*ends, 0.0]) or 1.0
    labels = {"seen": "Model", "blind": "Blind", "noise": "Noise", "untrained": "Untrained"}

    def percent(value: float | None) -> float | None:
        return None if value is None else round(100 * min(max(value / longest, 0.0), 1.0), 2)

    return [
        Bar(
            label=labels[view],
            measured=m,
            width=percent(m.value) or 0.0,
            low=percent(m.low),
            high=percent(m.high),
        )
        for view, m in views.items()
    ]


def as_number(value: object) -> float | None:
    """Return a value that was measured as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
