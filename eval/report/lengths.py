"""How long the texts are and how they end: a histogram for each kind, and bars of stop rates.

Owns bins and places in the units of an SVG view box; `templates/charts.html.j2` draws them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from eval.report.chart_axes import BOTTOM, LEFT, RIGHT, TOP, Tick, round_values, scaled
from eval.report.gallery import KIND_TITLES, GalleryText
from eval.report.scores import Bar, Section, bars_of, titled_sections

_MOST_BINS = 30
_FEWEST_PLACES = 10


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Texts of one length or of a few neighbouring ones, as a column of two parts."""

    left: float
    width: float
    stopped_top: float
    """Upper end of the part that ended by itself; it stands on the axis."""
    cut_top: float
    """Upper end of the part that was cut, which stands on the other."""
    words: str


@dataclass(frozen=True, kw_only=True)
class LengthChart:
    """Columns and ticks in view box units, and what they show in words."""

    title: str
    bins: list[Bin]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    summary: str


@dataclass(frozen=True, kw_only=True)
class StopRates:
    """Stop rates of one kind beside its controls."""

    title: str
    bars: Sequence[Bar]


def length_charts(examples: Sequence[GalleryText]) -> list[LengthChart]:
    """Lay out the number of tokens of the texts, a chart a kind; kinds without any are left out."""
    by_kind = {kind: [e for e in examples if e.kind == kind] for kind in KIND_TITLES}
    return [_length_chart(KIND_TITLES[kind], texts) for kind, texts in by_kind.items() if texts]


def stop_rates(scores: Section) -> list[StopRates]:
    """Return the stop rates that were measured."""
    return [
        StopRates(title=title, bars=bars_of(section, "stop_rate"))
        for title, section in titled_sections(scores).items()
        if "stop_rate" in section
    ]


def _length_chart(title: str, texts: Sequence[GalleryText]) -> LengthChart:
    longest = max(e.num_tokens for e in texts)
    step = math.ceil((longest + 1) / _MOST_BINS)
    numbers = range(longest // step + 1)
    stopped = [sum(e.stopped and e.num_tokens // step == n for e in texts) for n in numbers]
    cut = [sum(not e.stopped and e.num_tokens // step == n for e in texts) for n in numbers]
    lengths = round_values(0, max(longest + step, _FEWEST_PLACES), smallest=1)
    counts = round_values(0, max(map(sum, zip(stopped, cut, strict=True))), smallest=1)

    def column(n: int) -> Bin:
        left, right = (scaled(place * step, lengths, LEFT, RIGHT) for place in (n, n + 1))
        tops = [scaled(value, counts, BOTTOM, TOP) for value in (stopped[n], stopped[n] + cut[n])]
        first, last = n * step, n * step + step - 1
        tokens = f"{first}" if first == last else f"{first} to {last}"
        return Bin(
            left=left,
            width=max(round(right - left - 1.5, 1), 1.0),
            stopped_top=tops[0],
            cut_top=tops[1],
            words=f"{tokens} tokens: {stopped[n]:,} ended by themselves, {cut[n]:,} cut",
        )

    # The number n has the place from n to n + 1.
    ticks = [Tick(scaled(v + 0.5, lengths, LEFT, RIGHT), f"{v:,.0f}") for v in lengths[:-1]]
    return LengthChart(
        title=title,
        bins=[column(n) for n in numbers if stopped[n] + cut[n]],
        x_ticks=ticks,
        y_ticks=[Tick(scaled(v, counts, BOTTOM, TOP), f"{v:,.0f}") for v in counts],
        summary=_summary(texts),
    )


def _summary(texts: Sequence[GalleryText]) -> str:
    tokens = [e.num_tokens for e in texts]
    num_cut = sum(not e.stopped for e in texts)
    cut = f"{num_cut:,} were cut at the limit" if num_cut else "none was cut at the limit"
    least, most = min(tokens), max(tokens)
    span = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return (
        f"{len(texts):,} texts of {span} token{'s' * (most > 1)}, median {median(tokens):g}; {cut}."
    )
