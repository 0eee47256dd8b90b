"""The scores of `reports/eval.json` as the page reads them: names, units, intervals, comparisons.

A score counts only against its controls, the same questions without what the model needs to know of
the picture: what it reaches without, it has not learned from pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.compare import as_number

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

SEEN, BLIND = "seen", "blind"
STAGE_1 = "Captions of stage 1 alone"
SUBSET = "Yes or no, {}"


@dataclass(frozen=True)
class Label:
    """What a view is called."""

    bar: str
    """Beside a bar, where there is little room."""
    column: str
    """Above a column of a table."""
    sentence: str
    """In a sentence, behind an article."""


VIEWS = {
    SEEN: Label("Model", "Model", "model"),
    BLIND: Label("Wrong image", "Wrong image", "wrong-image control"),
    "noise": Label("Noise", "Noise", "noise control"),
    "untrained": Label("Untrained", "Untrained projector", "untrained projector"),
}
"""Key of each view of a section, and what it is called; all but the first are controls."""

CONTROLS = tuple(view for view in VIEWS if view != SEEN)


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


def titled_sections(scores: Section) -> dict[str, Section]:
    """Return what was scored, each section under its title, in the order of the page."""
    sections = {
        "Captions": section_of(scores, "captions"),
        STAGE_1: section_of(scores, "pretrain_only", "captions"),
        "Answers": section_of(scores, "answers"),
        **{SUBSET.format(name): part for name, part in pope_sections(scores).items()},
    }
    return {title: section for title, section in sections.items() if section}


def views_of(section: Section) -> dict[str, Section]:
    """Return what is beside one another: the scores under `seen`, and the controls there are."""
    controls = {view: section[view] for view in CONTROLS if section.get(view)}
    return {SEEN: section, **controls}


def is_over_nothing(section: Section, key: str) -> bool:
    """Say whether a score is of nothing, whatever its number: exact match without short targets."""
    return key == "exact_match" and section.get("short_count") == 0


def measured_views(section: Section, key: str) -> dict[str, Measured]:
    """Return one score of each view there is; of nothing, none has a value."""
    nothing = is_over_nothing(section, key)
    views = views_of(section)
    return {view: measured({} if nothing else values, key) for view, values in views.items()}


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
    views = measured_views(section, key)
    ends = [end for m in views.values() for end in (m.value, m.high) if end is not None]
    longest = 1.0 if METRICS[key].style == "share" else max([*ends, 0.0]) or 1.0

    def percent(value: float | None) -> float | None:
        return None if value is None else round(100 * min(max(value / longest, 0.0), 1.0), 2)

    return [
        Bar(
            label=VIEWS[view].bar,
            measured=m,
            width=percent(m.value) or 0.0,
            low=percent(m.low),
            high=percent(m.high),
        )
        for view, m in views.items()
    ]
