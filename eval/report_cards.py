"""The summary of the page: each main score beside its controls, and a verdict in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval.report_scores import (
    CONTROLS,
    METRICS,
    Bar,
    Measured,
    Metric,
    Section,
    bars_of,
    measured,
    pope_sections,
    section_of,
    views_of,
)

State = Literal["good", "bad", "open"]


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
    """Return the summary cards of the scores that were measured."""
    captions, answers = section_of(scores, "captions"), section_of(scores, "answers")
    wanted = [
        ("Captions", captions, "CIDEr"),
        ("Answers", answers, "exact_match"),
        ("Answers", answers, "token_f1"),
        ("Answers", answers, "loss"),
        *((f"Yes or no, {name}", part, "accuracy") for name, part in pope_sections(scores).items()),
        ("Captions of stage 1 alone", section_of(scores, "pretrain_only", "captions"), "CIDEr"),
    ]
    return [_card(title, section, key) for title, section, key in wanted if key in section]


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
    seen = measured(section, key)
    if seen.value is None:
        return Verdict(state="open", text="Cannot be judged: the score was not measured.")
    views = views_of(section)
    controls = {view: measured(views.get(view, {}), key) for view in CONTROLS}
    outcomes = {view: seen.beats(control) for view, control in controls.items()}
    won = [f"the {CONTROLS[view]}" for view, outcome in outcomes.items() if outcome]
    unknown = [f"the {CONTROLS[view]}" for view, outcome in outcomes.items() if outcome is None]
    lost = [
        f"the {CONTROLS[view]} ({_why(seen, controls[view])})"
        for view, outcome in outcomes.items()
        if outcome is False
    ]
    text = " ".join(
        sentence
        for names, sentence in (
            (lost, f"Does NOT beat {_listed(lost, 'or')}."),
            (won, f"Beats {_listed(won, 'and')}."),
            (unknown, f"No interval to judge by against {_listed(unknown, 'and')}."),
        )
        if names
    )
    if len(won) == len(CONTROLS):
        return Verdict(state="good", text="Beats all three controls.")
    return Verdict(state="bad" if lost else "open", text=text)


def _why(seen: Measured, control: Measured) -> str:
    return "which is better" if control.beats(seen) else "the intervals overlap"


def _listed(names: Sequence[str], last: str) -> str:
    return f" {last} ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])


def _card(title: str, section: Section, key: str) -> Card:
    count = section.get("short_count" if key == "exact_match" else "count")
    if count is None:
        count = section.get("count")
    return Card(
        title=title,
        metric=METRICS[key],
        texts="" if count is None else f"{METRICS['count'].written(count)} texts",
        bars=bars_of(section, key),
        verdict=judge(section, key),
    )
