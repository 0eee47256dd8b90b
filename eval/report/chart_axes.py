"""The frame that the small charts of the page share: place in an SVG view box, ticks, scales."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 400, 32, 216


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


def round_values(low: float, high: float, smallest: float) -> list[float]:
    """Return three to seven evenly spaced round numbers that enclose a range.

    Args:
        low: Least value of the range.
        high: Greatest value of the range.
        smallest: Least distance of two numbers.
    """
    rough = max((high - low) / 5, smallest)
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first = math.floor(low / spacing)
    last = max(math.ceil(high / spacing), first + 2)
    return [count * spacing for count in range(first, last + 1)]


def scaled(value: float, values: Sequence[float], start: float, end: float) -> float:
    """Place a value between `start` and `end` as it lies between the ends of `values`."""
    share = (value - values[0]) / (values[-1] - values[0])
    return round(start + (end - start) * share, 1)
