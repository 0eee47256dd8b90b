"""The cards at the top of the page: each main score beside its controls, with a verdict.

The verdict follows the gain over the wrong image; other controls that are not beaten are named.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eval.bootstrap import Gain
from eval.report.scores import (
    LABELS,
    STAGE_1,
    Bar,
    GainText,
    Metric,
    Section,
    bars_of,
    gain_over,
    gain_text,
    measured,
    metric_of,
    titled_sections,
)
from eval.scoring.gains import DOES_NOT_USE, USES, judgement
from eval.scoring.score_names import BLIND, CONTROLS, MAIN_SCORES, has_no_short_targets


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
    gain: Gain | None
    """Over the wrong image; None if it was not measured."""
    verdict: Verdict

    @property
    def gain_text(self) -> GainText | None:
        """The gain in words."""
        return gain_text(self.metric, self.gain) if self.gain else None


def score_cards(scores: Section) -> list[Card]:
    """Return a card for each main score that was measured, those of stage 1 last."""
    sections = sorted(titled_sections(scores).items(), key=lambda item: item[0].startswith(STAGE_1))
    return [
        _card(title, section, key)
        for title, section in sections
        for key in MAIN_SCORES
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
        gain=gain_over(section, key, BLIND),
        verdict=judge(section, key),
    )


def headline(cards: Sequence[Card]) -> Verdict | None:
    """Return a verdict over all cards, or None without cards."""
    if not cards:
        return None
    num_open = sum(card.gain is None for card in cards)
    if num_open:
        text = f"{num_open} of {len(cards)} main scores have no gain over the wrong image to judge."
        return Verdict(state="open", text=text)
    gains = {f"{card.title}: {card.metric.label}": card.gain for card in cards if card.gain}
    is_good = all(gain.is_shown for gain in gains.values())
    return Verdict(state="good" if is_good else "bad", text=f"The model {judgement(gains)}.")


def judge(section: Section, key: str) -> Verdict:
    """Judge by the gain over the wrong image, and name the other controls that are not beaten."""
    gain = gain_over(section, key, BLIND)
    if gain is None:
        is_measured = measured(section, key).value is not None
        missing = "gain over the wrong image" if is_measured else "score"
        return Verdict(state="open", text=f"The {missing} was not measured.")
    if not gain.is_shown:
        text = f"{DOES_NOT_USE.capitalize()}, as far as {gain.images:,} images can show."
        return Verdict(state="bad", text=text)
    others = {c: gain_over(section, key, c) for c in CONTROLS if c != BLIND}
    lost = [
        f"the {LABELS[c].sentence}" for c, other in others.items() if other and not other.is_shown
    ]
    but = f", but shows no gain over {' or '.join(lost)}" if lost else ""
    return Verdict(state="good", text=f"{USES.capitalize()}{but}.")
