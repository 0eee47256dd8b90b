"""Lays out the charts of the page in the units of an SVG view box: losses, lengths of texts.

`templates/charts.html.j2` draws them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from eval.report.gallery import KIND_TITLES, GalleryText
from eval.report.scores import Bar, Section, bars_of, titled_sections
from eval.scoring.score_names import as_number

WIDTH, HEIGHT = 420, 260
LEFT, RIGHT, TOP, BOTTOM = 48, 400, 32, 216

_MAX_POINTS = 400
_MAX_BINS = 30
_MIN_TOKENS = 10
"""Least end of the axis of tokens."""

Point = tuple[float, float]
Rows = Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis."""

    at: float
    label: str


class Axis:
    """A linear axis with three to seven evenly spaced round numbers that enclose a range."""

    def __init__(self, low: float, high: float, smallest: float, ends: Point) -> None:
        """Choose the numbers.

        Args:
            low: Least value of the range.
            high: Greatest value of the range.
            smallest: Least distance of two numbers.
            ends: Places of the first and the last number in the view box.
        """
        rough = max((high - low) / 5, smallest)
        power = 10.0 ** math.floor(math.log10(rough))
        spacing = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.floor(low / spacing)
        last = max(math.ceil(high / spacing), first + 2)
        self.numbers = [count * spacing for count in range(first, last + 1)]
        self._ends = ends

    def place(self, value: float) -> float:
        """Return the place of a value in the view box."""
        start, end = self._ends
        share = (value - self.numbers[0]) / (self.numbers[-1] - self.numbers[0])
        return round(start + (end - start) * share, 1)

    def ticks(self, style: str = ",.0f") -> list[Tick]:
        """Return a tick for each number, formatted in a style."""
        return [Tick(self.place(number), format(number, style)) for number in self.numbers]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """The axes of a chart, and its content in words."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str


@dataclass(frozen=True, kw_only=True)
class LossChart(Chart):
    """Two lines over optimizer steps."""

    train: list[Point]
    validation: list[Point]


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A column of two stacked parts: the texts within a range of lengths."""

    left: float
    width: float
    stopped_top: float
    """Upper end of the lower part, the finished texts."""
    cut_top: float
    """Upper end of the upper part, the texts that were cut off."""
    words: str


@dataclass(frozen=True, kw_only=True)
class LengthChart(Chart):
    """A histogram of the lengths of texts in tokens."""

    title: str
    bins: list[Bin]


def loss_chart(rows: Rows) -> LossChart | None:
    """Lay out the loss of a run.

    Args:
        rows: Rows of a history with `step`, `loss` and perhaps `validation_loss`; values that are
            not finite numbers are left out.

    Returns:
        The chart, or None if no row has a loss.
    """
    train, validation = _series(rows, "loss"), _series(rows, "validation_loss")
    points = train + validation
    if not points:
        return None
    losses = [loss for _, loss in points]
    x = Axis(0, max(step for step, _ in points), 1, (LEFT, RIGHT))
    y = Axis(min(losses), max(losses), 0.01, (BOTTOM, TOP))
    return LossChart(
        train=[(x.place(step), y.place(loss)) for step, loss in train],
        validation=[(x.place(step), y.place(loss)) for step, loss in validation],
        x_ticks=x.ticks(),
        y_ticks=y.ticks(".5g"),
        summary=_loss_summary("Train", train) + _loss_summary("Validation", validation),
    )


def _series(rows: Rows, column: str) -> list[Point]:
    pairs = ((as_number(row.get("step")), as_number(row.get(column))) for row in rows)
    points = [(step, loss) for step, loss in pairs if step is not None and loss is not None]
    stride = math.ceil(len(points) / _MAX_POINTS) or 1
    # Counted from the end, so that the last step is always drawn.
    return points[::-1][::stride][::-1]


def _loss_summary(name: str, points: list[Point]) -> str:
    if not points:
        return ""
    (_, first), (step, last) = points[0], points[-1]
    return f"{name} loss: {first:.3f} at first, {last:.3f} at step {step:,.0f}. "


def length_charts(examples: Sequence[GalleryText]) -> list[LengthChart]:
    """Lay out the lengths of the texts, a chart for each kind that has any."""
    return [
        _length_chart(title, texts)
        for kind, title in KIND_TITLES.items()
        if (texts := [e for e in examples if e.kind == kind])
    ]


def _length_chart(title: str, texts: Sequence[GalleryText]) -> LengthChart:
    longest = max(e.num_tokens for e in texts)
    step = math.ceil((longest + 1) / _MAX_BINS)
    numbers = range(longest // step + 1)
    stopped = [sum(e.stopped and e.num_tokens // step == n for e in texts) for n in numbers]
    cut = [sum(not e.stopped and e.num_tokens // step == n for e in texts) for n in numbers]
    x = Axis(0, max(longest + step, _MIN_TOKENS), 1, (LEFT, RIGHT))
    y = Axis(0, max(map(sum, zip(stopped, cut, strict=True))), 1, (BOTTOM, TOP))

    def column(n: int) -> Bin:
        first, last = n * step, n * step + step - 1
        left, right = x.place(first), x.place(first + step)
        tokens = f"{first}" if first == last else f"{first} to {last}"
        return Bin(
            left=left,
            width=max(round(right - left - 1.5, 1), 1.0),
            stopped_top=y.place(stopped[n]),
            cut_top=y.place(stopped[n] + cut[n]),
            words=f"{tokens} tokens: {stopped[n]:,} finished, {cut[n]:,} cut off",
        )

    return LengthChart(
        title=title,
        bins=[column(n) for n in numbers if stopped[n] + cut[n]],
        # The column of n tokens reaches from n to n + 1.
        x_ticks=[Tick(x.place(v + 0.5), f"{v:,.0f}") for v in x.numbers[:-1]],
        y_ticks=y.ticks(),
        summary=_length_summary(texts),
    )


def _length_summary(texts: Sequence[GalleryText]) -> str:
    tokens = [e.num_tokens for e in texts]
    num_cut = sum(not e.stopped for e in texts)
    cut = f"{num_cut:,}" if num_cut else "none"
    verb = "were" if num_cut > 1 else "was"
    least, most = min(tokens), max(tokens)
    span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return (
        f"{len(texts):,} texts of {span} token{'s' * (most > 1)}, median {median(tokens):g}; "
        f"{cut} {verb} cut off."
    )


def stop_rates(scores: Section) -> dict[str, Sequence[Bar]]:
    """Return the bars of the stop rates under the titles of their sections."""
    return {
        title: bars_of(section, "stop_rate")
        for title, section in titled_sections(scores).items()
        if "stop_rate" in section
    }
