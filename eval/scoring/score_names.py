"""Names in `reports/eval.json` that several readers share, and when a score there has no value."""

import math
from collections.abc import Mapping
from typing import Any

SEEN, BLIND = "seen", "blind"
"""The image's own features, and the features of another image."""

CONTROLS = (BLIND, "noise", "untrained")
CONDITIONS = (SEEN, *CONTROLS)
"""The conditions of `eval.scoring.conditions`; a section holds its controls under these keys."""


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
