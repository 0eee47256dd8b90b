"""Reads gains from `reports/eval.json`, and says whether a model uses the picture.

A score of a model that uses the picture is better with the right image than with a wrong one. The
page, the summary, the model card and `eval.compare` all judge by the gain over the wrong image.
"""

from collections.abc import Mapping
from typing import Any

from eval.bootstrap import Gain
from eval.scoring.score_names import BLIND, GAINS, as_number

NUMBERS = ("gain", "p", "detectable", "images")
"""The fields of `Gain` that are numbers."""

USES, DOES_NOT_USE = "uses the picture", "does not use the picture"


def read_gain(section: Mapping[str, Any], key: str, control: str = BLIND) -> Gain | None:
    """Return the gain of a score over a control.

    Args:
        section: A section of `reports/eval.json`.
        key: The score.
        control: The control.

    Returns:
        None if the gain was not measured, or no text counts in the score: exact match has none
        without short targets.
    """
    return parse_gain(((section.get(GAINS) or {}).get(control) or {}).get(key) or {})


def parse_gain(found: Mapping[str, Any]) -> Gain | None:
    """Return a gain from the fields of `Gain`; None as `read_gain` does."""
    ends = found.get("interval") or (None, None)
    values = [found.get(name) for name in NUMBERS]
    numbers = [number for v in (*values, *ends) if (number := as_number(v)) is not None]
    if len(numbers) < len(values) + len(ends) or not found["images"]:
        return None
    gain, p, detectable, images, low, high = numbers
    return Gain(gain, [low, high], p, detectable, int(images))


def written(gain: Gain) -> str:
    """Write a gain with its interval and p value."""
    low, high = gain.interval
    return f"{gain.gain:+.3f}, {low:.3f} to {high:.3f}, {gain.p_text}"


def use_of_picture(gain: Gain) -> str:
    """Return in words whether a score shows that the model uses the picture."""
    return USES if gain.is_shown else DOES_NOT_USE


def judgement(gains: Mapping[str, Gain]) -> str:
    """Return in words whether a model uses the picture.

    Args:
        gains: Main score to its gain over the wrong image, at least one.
    """
    lost = [name for name, gain in gains.items() if not gain.is_shown]
    if len(lost) == len(gains):
        return f"{DOES_NOT_USE}: none of {len(gains)} main scores gains over the wrong image"
    if lost:
        return (
            f"{USES} by {len(gains) - len(lost)} of {len(gains)} main scores, and shows no gain "
            f"over the wrong image in {', '.join(lost)}"
        )
    return f"{USES}: all {len(gains)} main scores gain over the wrong image"
