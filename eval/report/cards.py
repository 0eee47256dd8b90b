"""The cards at the top of the page: each main score beside its controls, with a verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval.report.scores import (
    LABELS,
    STAGE_1,
    Bar,
    Metric,
    Section,
    bars_of,
    measured,
    measured_by_condition,
    metric_of,
    titled_sections,
)
from eval.scoring.score_names import CONTROLS, SEEN, has_no_short_targets

_MAIN_SCORES = {
    "Captions": ("CIDEr",),
    "Answers": ("exact_match", "token_f1", "loss"),
    STAGE_1: ("CIDEr",),
}
"""Section to the scores that have a card. Sections of yes/no questions have one, the accuracy."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A judgement in words; its state sets the colour."""

    state: Literal["good", "bad", "open"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One score beside its controls."""

    title: str
    metric: Metric
    texts: str
    """Number of scored texts; empty if not known."""
    bars: Sequence[Bar]
    verdict: Verdict


def score_cards(scores: Section) -> list[Card]:
    """Return a card for each main score that was measured, those of stage 1 last."""
    sections = sorted(titled_sections(scores).items(), key=lambda item: item[0] == STAGE_1)
    return [
        _card(title, section, key)
        for title, section in sections
        for key in _MAIN_SCORES.get(title, ("accuracy",))
        if key in section and not has_no_short_targets(section, key)
    ]


def _card(title: str, section: Section, key: str) -> Card:
    count = section.get("count")
    if key == "exact_match":
        count = section.get("short_count", count)
    return Card(
        title=title,
        metric=metric_of(key),
        texts="" if count is None else f"{metric_of('count').written(count)} texts",
        bars=bars_of(section, key),
        verdict=judge(section, key),
    )


def headline(cards: Sequence[Card]) -> Verdict | None:
    """Return a verdict over all cards, or None without cards."""
    if not cards:
        return None
    lost = [card for card in cards if card.verdict.state == "bad"]
    num_open = sum(card.verdict.state == "open" for card in cards)
    if lost:
        names = "; ".join(f"{card.title}: {card.metric.label}" for card in lost)
        text = f"{len(lost)} of {len(cards)} main scores do NOT beat every control ({names})."
        return Verdict(state="bad", text=text)
    if num_open:
        text = (
            f"{num_open} of {len(cards)} main scores cannot be compared with every control: "
            f"scores or intervals are missing."
        )
        return Verdict(state="open", text=text)
    text = f"All {len(cards)} main scores beat all {len(CONTROLS)} controls."
    return Verdict(state="good", text=text)


def judge(section: Section, key: str) -> Verdict:
    """Compare a score with each of its controls.

    A score beats a control if it is better and their intervals do not overlap.
    """
    conditions = measured_by_condition(section, key)
    model = conditions[SEEN]
    if model.value is None:
        return Verdict(state="open", text="The score was not measured.")
    beaten, not_beaten, unknown = [], [], []
    for control in CONTROLS:
        other = conditions.get(control) or measured({}, key)
        name = f"the {LABELS[control].sentence}"
        outcome = model.beats(other)
        if outcome is None:
            unknown.append(name)
        elif outcome:
            beaten.append(name)
        else:
            reason = "which is better" if other.beats(model) else "the intervals overlap"
            not_beaten.append(f"{name} ({reason})")
    if len(beaten) == len(CONTROLS):
        return Verdict(state="good", text="Beats every control.")
    sentences = []
    if not_beaten:
        sentences.append(f"Does NOT beat {_listed(not_beaten, 'or')}.")
    if beaten:
        sentences.append(f"Beats {_listed(beaten, 'and')}.")
    if unknown:
        sentences.append(f"No interval to compare with {_listed(unknown, 'and')}.")
    return Verdict(state="bad" if not_beaten else "open", text=" ".join(sentences))


def _listed(names: Sequence[str], conjunction: str) -> str:
    *first, last = names
    return f"{', '.join(first)} {conjunction} {last}" if first else last
