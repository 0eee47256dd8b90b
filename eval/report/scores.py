"""Reads the scores of `reports/eval.json` for the page: labels, units, intervals, gains.

A score counts only against its controls, which ask the same questions without the image's own
features or without a trained projector: a model does not owe a control's score to pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eval.bootstrap import Gain
from eval.scoring.budget import of_images
from eval.scoring.gains import read_gain
from eval.scoring.score_names import (
    BLIND,
    POSSIBLE_CONTROLS,
    SEEN,
    TRAINED_BLIND,
    as_number,
    has_no_short_targets,
)

Section = Mapping[str, Any]
Style = Literal["number", "share", "length", "count"]

_DECIMALS = {"number": 3, "length": 1, "count": 0}
_DASH = "\u2013"


@dataclass(frozen=True)
class Metric:
    """The label, meaning and format of one score."""

    label: str
    meaning: str
    style: Style = "number"

    def written(self, value: object) -> str:
        """Return the value as text with its unit, or a dash for anything but a number."""
        number = as_number(value)
        if number is None:
            return _DASH
        if self.style == "share":
            return f"{number:.1%}"
        return f"{number:,.{_DECIMALS[self.style]}f}"

    def difference(self, value: float, sign: str = "") -> str:
        """Return a difference of two values as text, of shares in percentage points."""
        if self.style == "share":
            return f"{100 * value:{sign}.1f} points"
        return f"{value:{sign},.{_DECIMALS[self.style]}f}"


METRICS = {
    "CIDEr": Metric("CIDEr", "agreement with captions by people; papers print 1.000 as 100"),
    "BLEU-1": Metric("BLEU-1", "share of words that are in captions by people"),
    "BLEU-2": Metric("BLEU-2", "the same for word pairs"),
    "BLEU-3": Metric("BLEU-3", "for runs of three words"),
    "BLEU-4": Metric("BLEU-4", "for runs of four words"),
    "ROUGE-L": Metric("ROUGE-L", "longest common sequence of words"),
    "exact_match": Metric(
        "Exact match", "same words as the target, of at most five words", "share"
    ),
    "token_f1": Metric("Token F1", "overlap with the words of the target", "share"),
    "loss": Metric("Loss", "per token of the target, in nats; lower is better"),
    "accuracy": Metric("Accuracy", "right answers", "share"),
    "precision": Metric("Precision", "share of right answers among those that say yes", "share"),
    "recall": Metric("Recall", "share of yes among the answers that should be yes", "share"),
    "f1": Metric("F1", "harmonic mean of precision and recall", "share"),
    "yes_rate": Metric("Yes-rate", "questions answered with yes", "share"),
    "stop_rate": Metric("Stop rate", "texts that end by themselves", "share"),
    "repeated_4grams": Metric("Repeated 4-grams", "of all runs of four words", "share"),
    "mean_tokens": Metric("Mean length", "in tokens", "length"),
    "mean_words": Metric("Mean words", "between white space", "length"),
    "short_count": Metric("Short targets", "targets of at most five words", "count"),
    "count": Metric("Texts", "that were scored", "count"),
}


def metric_of(key: str) -> Metric:
    """Return the metric of a key in `eval.json`; an unlisted key is its own label."""
    return METRICS.get(key, Metric(key, ""))


STAGE_1 = "Captions of stage 1 alone"
SUBSET = "Yes or no, {}"


@dataclass(frozen=True)
class Label:
    """The names of a condition on the page."""

    bar: str
    """Short, beside a bar."""
    column: str
    """Above a column of a table."""
    sentence: str
    """In a sentence, after an article."""


LABELS = {
    SEEN: Label("Model", "Model", "model"),
    BLIND: Label("Wrong image", "Wrong image", "wrong-image control"),
    "noise": Label("Noise", "Noise", "noise control"),
    "untrained": Label("Untrained", "Untrained projector", "untrained projector"),
    TRAINED_BLIND: Label("No sight", "Trained without sight", "model trained without sight"),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One score and its 95 % interval; None where nothing was measured."""

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


@dataclass(frozen=True, kw_only=True)
class GainText:
    """A gain in words."""

    value: str
    """With its sign and unit."""
    interval: str
    p: str
    limit: str
    """A sentence: what gain the images can show."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One row of a card; width, low and high are percent of the longest row."""

    label: str
    measured: Measured
    width: float
    low: float | None
    high: float | None


def section_of(scores: Section, *path: str) -> Section:
    """Return a section of the scores; empty if it is absent or has no text."""
    section: Any = scores
    for name in path:
        section = section.get(name) or {}
    return section if section.get("count", 1) else {}


def pope_sections(scores: Section) -> dict[str, Section]:
    """Return the scored subsets of yes-no questions by name."""
    subsets = {name: section_of(scores, "pope", name) for name in scores.get("pope") or {}}
    return {name: section for name, section in subsets.items() if section}


def titled_sections(scores: Section) -> dict[str, Section]:
    """Return the sections that have texts by their titles, in the order of the page."""
    sections = {
        "Captions": section_of(scores, "captions"),
        STAGE_1: section_of(scores, "pretrain_only", "captions"),
        "Answers": section_of(scores, "answers"),
        **{SUBSET.format(name): part for name, part in pope_sections(scores).items()},
    }
    return {title + of_images(section): section for title, section in sections.items() if section}


def by_condition(section: Section) -> dict[str, Section]:
    """Return the scores by condition: the section itself under `seen`, then its controls."""
    return {SEEN: section} | {
        name: section[name] for name in POSSIBLE_CONTROLS if section.get(name)
    }


def measured_by_condition(section: Section, key: str) -> dict[str, Measured]:
    """Return one score under each condition; exact match without short targets has no value."""
    empty = has_no_short_targets(section, key)
    sections = by_condition(section)
    return {name: measured({} if empty else part, key) for name, part in sections.items()}


def measured(section: Section, key: str) -> Measured:
    """Return one score of a section."""
    low, high = (section.get("intervals") or {}).get(key) or (None, None)
    return Measured(
        metric=metric_of(key),
        value=as_number(section.get(key)),
        low=as_number(low),
        high=as_number(high),
    )


def gain_over(section: Section, key: str, control: str) -> Gain | None:
    """Return the gain of a score over a control; None if either was not measured."""
    conditions = measured_by_condition(section, key)
    if None in (conditions[SEEN].value, (conditions.get(control) or measured({}, key)).value):
        return None
    return read_gain(section, key, control)


def gain_text(metric: Metric, gain: Gain) -> GainText:
    """Return the gain of a score in words."""
    difference = metric.difference
    low, high = (difference(end) for end in gain.interval)
    images = f"{gain.images:,} image{'s' * (gain.images > 1)}"
    if not gain.has_enough_images:
        limit = f"{images} cannot show any gain."
    elif gain.detectable:
        limit = (
            f"With {images}, a true gain of {difference(gain.detectable)} shows in 4 of 5 cases."
        )
    else:
        limit = f"The difference is the same in all {images}."
    return GainText(
        value=difference(gain.gain, "+"),
        interval=f"{low.removesuffix(' points')} to {high}",
        p=gain.p_text,
        limit=limit,
    )


def bars_of(section: Section, key: str) -> list[Bar]:
    """Return a bar for each condition; a share is drawn against 100 %."""
    conditions = measured_by_condition(section, key)
    ends = [end for m in conditions.values() for end in (m.value, m.high) if end is not None]
    longest = 1.0 if metric_of(key).style == "share" else max([*ends, 0.0]) or 1.0

    def percent(value: float | None) -> float | None:
        return None if value is None else round(100 * min(max(value / longest, 0.0), 1.0), 2)

    return [
        Bar(
            label=LABELS[name].bar,
            measured=m,
            width=percent(m.value) or 0.0,
            low=percent(m.low),
            high=percent(m.high),
        )
        for name, m in conditions.items()
    ]
