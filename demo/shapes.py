"""The shapes of the ten nouns on a unit square: parts with their tones, back to front."""

import math
from dataclasses import dataclass

Point = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """A filled polygon, or an ellipse given by two corners of its box."""

    points: tuple[Point, ...]
    tone: str = "main"
    """"main" is the thing's colour, "shade" a darker one; others are keys of `FIXED_TONES`."""
    round: bool = False


FIXED_TONES = {
    "wood": (122, 84, 52),
    "sail": (236, 228, 210),
    "glass": (190, 220, 235),
    "tyre": (52, 50, 54),
    "leaf": (74, 120, 60),
}


def _disc(x: float, y: float, radius: float, tone: str = "main") -> Part:
    return Part(((x - radius, y - radius), (x + radius, y + radius)), tone, round=True)


def _bar(left: float, top: float, right: float, bottom: float, tone: str = "main") -> Part:
    return Part(((left, top), (right, top), (right, bottom), (left, bottom)), tone)


def _ring(x: float, y: float, radii: tuple[float, ...], num_points: int) -> tuple[Point, ...]:
    """Return points around a centre, the first straight up, with alternating radii."""
    angles = [2 * math.pi * step / num_points for step in range(num_points)]
    return tuple(
        (
            x + radii[step % len(radii)] * math.sin(angle),
            y - radii[step % len(radii)] * math.cos(angle),
        )
        for step, angle in enumerate(angles)
    )


SHAPES: dict[str, tuple[Part, ...]] = {
    "ball": (_disc(0.5, 0.5, 0.42), _bar(0.1, 0.42, 0.9, 0.58, "sail")),
    "box": (
        _bar(0.12, 0.3, 0.72, 0.9),
        Part(((0.12, 0.3), (0.3, 0.1), (0.9, 0.1), (0.72, 0.3)), "shade"),
        Part(((0.72, 0.3), (0.9, 0.1), (0.9, 0.7), (0.72, 0.9)), "shade"),
        _bar(0.34, 0.3, 0.5, 0.9, "wood"),
    ),
    "star": (Part(_ring(0.5, 0.53, (0.5, 0.2), 10)), _disc(0.5, 0.53, 0.13, "glass")),
    "tree": (
        _bar(0.43, 0.7, 0.57, 0.98, "wood"),
        Part(
            (
                (0.5, 0.02),
                (0.74, 0.36),
                (0.62, 0.36),
                (0.88, 0.74),
                (0.12, 0.74),
                (0.38, 0.36),
                (0.26, 0.36),
            )
        ),
    ),
    "house": (
        _bar(0.16, 0.46, 0.84, 0.94),
        Part(((0.06, 0.48), (0.5, 0.06), (0.94, 0.48)), "shade"),
        _bar(0.42, 0.62, 0.6, 0.94, "wood"),
    ),
    "car": (
        Part(((0.24, 0.5), (0.34, 0.26), (0.68, 0.26), (0.8, 0.5)), "glass"),
        Part(((0.03, 0.46), (0.86, 0.46), (0.97, 0.56), (0.97, 0.74), (0.03, 0.74))),
        _disc(0.26, 0.74, 0.13, "tyre"),
        _disc(0.74, 0.74, 0.13, "tyre"),
    ),
    "boat": (
        _bar(0.47, 0.06, 0.53, 0.66, "wood"),
        Part(((0.56, 0.08), (0.56, 0.58), (0.9, 0.58)), "sail"),
        Part(((0.04, 0.62), (0.96, 0.62), (0.78, 0.9), (0.22, 0.9))),
    ),
    "flower": (
        _bar(0.46, 0.5, 0.54, 0.98, "leaf"),
        *(_disc(x, y, 0.17) for x, y in _ring(0.5, 0.36, (0.2,), 5)),
        _disc(0.5, 0.36, 0.11, "wood"),
    ),
    "fish": (
        Part(((0.66, 0.5), (0.98, 0.22), (0.98, 0.78))),
        Part(((0.03, 0.24), (0.78, 0.76)), round=True),
        _disc(0.24, 0.44, 0.1, "sail"),
        _disc(0.24, 0.44, 0.05, "tyre"),
    ),
    "heart": (
        Part(((0.06, 0.1), (0.52, 0.56)), round=True),
        Part(((0.48, 0.1), (0.94, 0.56)), round=True),
        Part(((0.09, 0.44), (0.5, 0.4), (0.91, 0.44), (0.5, 0.94))),
        _disc(0.3, 0.3, 0.1, "sail"),
    ),
}
