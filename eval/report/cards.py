"""The summary of the page: each main score beside its controls, and a verdict in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval.report.scores import (
    LABELS,
    METRICS,
    STAGE_1,
    Bar,
    Measured,
    Metric,
    Section,
    bars_of,
    measured,
    measured_by_condition,
    titled_sections,
)
from eval.scoring.score_names import CONTROLS, SEEN, has_no_short_targets

State = Literal["good", "bad", "open"]

_MAIN = {
    "Captions": ("CIDEr",),
    "Answers": ("exact_match", "token_f1", "loss"),
    STAGE_1: ("CIDEr",),
}
"""Scores of a section that have a card; of yes/no questions, the accuracy."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judgement in words, and whether it is good news."""

    state: State
    text: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One score beside its controls."""

    title: str
    metric: Metric
    texts: str
    """How many texts it is over; empty where that is not known."""
    bars: Sequence[Bar]
    verdict: Verdict


def score_cards(scores: Section) -> list[Card]:
    """Return the summary cards of the scores that were measured, those of stage 1 last."""
    sections = sorted(titled_sections(scores).items(), key=lambda item: item[0] == STAGE_1)
    return [
        _card(title, section, key)
        for title, section in sections
        for key in _MAIN.get(title, ("accuracy",))
        if key in section and not has_no_short_targets(section, key)
    ]


def headline(cards: Sequence[Card]) -> Verdict | None:
    """Return one verdict over all cards, or None if there is none."""
    if not cards:
        return None
    lost = [card for card in cards if card.verdict.state == "bad"]
    won = [card for card in cards if card.verdict.state == "good"]
    if lost:
        names = "; ".join(f"{card.title}: {card.metric.label}" for card in lost)
        text = f"{len(lost)} of {len(cards)} main scores do NOT beat every control ({names})."
        return Verdict(state="bad", text=text)
    if len(won) == len(cards):
        text = f"All {len(cards)} main scores beat all {len(CONTROLS)} controls."
        return Verdict(state="good", text=text)
    text = (
        f"{len(cards) - len(won)} of {len(cards)} main scores cannot be judged against every "
        f"control: scores or intervals are missing."
    )
    return Verdict(state="open", text=text)


def judge(section: Section, key: str) -> Verdict:
    """Compare a score with each of its controls.

    A score beats a control if their intervals lie apart, the score's on the better side.
    """
    views = measured_by_condition(section, key)
    seen = views[SEEN]
    if seen.value is None:
        return Verdict(state="open", text="Cannot be judged: the score was not measured.")
    controls = {view: views.get(view) or measured({}, key) for view in CONTROLS}
    outcomes = {view: seen.beats(control) for view, control in controls.items()}
    names = {view: f"the {LABELS[view].sentence}" for view in CONTROLS}
    won = [names[view] for view, outcome in outcomes.items() if outcome]
    unknown = [names[view] for view, outcome in outcomes.items() if outcome is None]
    lost = [
        f"{names[view]} ({_why(seen, controls[view])})"
        for view, outcome in outcomes.items()
        if outcome is False
    ]
    text = " ".join(
        sentence
        for listed, sentence in (
            (lost, f"Does NOT beat {_listed(lost, 'or')}."),
            (won, f"Beats {_listed(won, 'and')}."),
            (unknown, f"No interval to judge by against {_listed(unknown, 'and')}."),
        )
        if listed
    )
    if len(won) == len(CONTROLS):
        return Verdict(state="good", text="Beats all three controls.")
    return Verdict(state="bad" if lost else "open", text=text)


def _why(seen: Measured, control: Measured) -> str:
    return "which is better" if control.beats(seen) else "the intervals overlap"


def _listed(names: Sequence[str], last: str) -> str:
    return f" {last} ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])


def _card(title: str, section: Section, key: str) -> Card:
    count = section.get("count")
    if key == "exact_match":
        count = section.get("short_count", count)
    return Card(
        title=title,
        metric=METRICS[key],
        texts="" if count is None else f"{METRICS['count'].written(count)} texts",
        bars=bars_of(section, key),
        verdict=judge(section, key),
    )
