"""Names in `reports/eval.json` that several readers share, and when a score there has no value."""

import math
from collections.abc import Mapping
from typing import Any

SEEN, BLIND, NOISE, UNTRAINED = "seen", "blind", "noise", "untrained"
"""The conditions of `eval.scoring.conditions`. Pages call `blind` "wrong image"."""

CONTROLS = (BLIND, NOISE, UNTRAINED)
"""Keys under which a section of scores holds its controls."""

TRAINED_BLIND = "trained_blind"
"""The control that learned the texts without the pictures; only where one was trained."""

POSSIBLE_CONTROLS = (*CONTROLS, TRAINED_BLIND)

CONDITIONS = (SEEN, *CONTROLS)

GAINS = "gains"
"""Key under which a section of scores holds the gains over its controls."""

MAIN_SCORES = ("CIDEr", "exact_match", "token_f1", "loss", "accuracy")
"""The scores that are judged: whether the model uses the picture."""

NO_BETTER_SIDE = ("stop_rate", "repeated_4grams", "mean_tokens", "mean_words", "yes_rate")
"""Scores that describe texts: more is neither better nor worse, so they have no gain."""


DECODING = "greedy"
"""How every text of an evaluation is decoded."""


def has_no_short_targets(section: Mapping[str, Any], key: str) -> bool:
    """Return whether a score is exact match without any short target, and so has no value."""
    return key == "exact_match" and section.get("short_count") == 0


def as_number(value: object) -> float | None:
    """Return a measured value as a finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        # An integer beyond every float.
        return None
