"""Turns the history of a run into the geometry of one small line chart.

Owns points in the units of an SVG view box; `templates/charts.html.j2` draws them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.report.chart_axes import BOTTOM, LEFT, RIGHT, TOP, Tick, round_values, scaled
from eval.scoring.score_names import as_number

_MAX_POINTS = 400

Point = tuple[float, float]
Rows = Sequence[Mapping[str, object]]


@dataclass(frozen=True, kw_only=True)
class LossChart:
    """Points and ticks in view box units, and what they show in words."""

    train: list[Point]
    validation: list[Point]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str


def loss_chart(rows: Rows) -> LossChart | None:
    """Lay out the loss over optimizer steps.

    Args:
        rows: Rows of a history with `step`, `loss` and perhaps `validation_loss`. A value that is
            missing or is no finite number is left out.

    Returns:
        The chart, or None if no row has a loss.
    """
    train, validation = _series(rows, "loss"), _series(rows, "validation_loss")
    points = train + validation
    if not points:
        return None
    losses = [loss for _, loss in points]
    steps = round_values(0, max(step for step, _ in points), smallest=1)
    heights = round_values(min(losses), max(losses), smallest=0.01)
    return LossChart(
        train=_placed(train, steps, heights),
        validation=_placed(validation, steps, heights),
        x_ticks=[Tick(scaled(value, steps, LEFT, RIGHT), f"{value:,.0f}") for value in steps],
        y_ticks=[Tick(scaled(value, heights, BOTTOM, TOP), f"{value:.5g}") for value in heights],
        summary=_summary("Train", train) + _summary("Validation", validation),
    )


def _series(rows: Rows, column: str) -> list[Point]:
    pairs = ((as_number(row.get("step")), as_number(row.get(column))) for row in rows)
    points = [(step, loss) for step, loss in pairs if step is not None and loss is not None]
    stride = math.ceil(len(points) / _MAX_POINTS) or 1
    # Counted from the end, so that the last step is always drawn.
    return points[::-1][::stride][::-1]


def _placed(points: list[Point], steps: list[float], heights: list[float]) -> list[Point]:
    return [(scaled(x, steps, LEFT, RIGHT), scaled(y, heights, BOTTOM, TOP)) for x, y in points]


def _summary(name: str, points: list[Point]) -> str:
    if not points:
        return ""
    (_, first), (step, last) = points[0], points[-1]
    return f"{name} loss: {first:.3f} at first, {last:.3f} at step {step:,.0f}. "
