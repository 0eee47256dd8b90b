import math

import pytest

from eval.report.charts import BOTTOM, LEFT, RIGHT, TOP, length_charts, loss_chart, stop_rates
from tests.eval.report.report_page import LOW, example, render, section


def texts(lengths, stopped=True, kind="caption"):
    return [
        example(i, 0.5, num_tokens=tokens, stopped=stopped, kind=kind)
        for i, tokens in enumerate(lengths)
    ]


def chart_of(examples):
    (chart,) = length_charts(examples)
    return chart


def height_of(chart, column):
    """Number of texts of a column, read off the axis."""
    bottom, top = chart.y_ticks[0], chart.y_ticks[-1]
    share = (bottom.at - column.cut_top) / (bottom.at - top.at)
    return share * int(top.label.replace(",", ""))


@pytest.mark.parametrize("longest", [0, 1, 5, 29, 30, 48, 1000])
def test_columns_add_up_to_the_texts_and_keep_within_the_axes(longest):
    lengths = [n * longest // 100 for n in range(101)]
    chart = chart_of(texts(lengths) + texts([longest] * 20, stopped=False))
    assert sum(height_of(chart, column) for column in chart.bins) == pytest.approx(121, abs=2)
    assert 1 <= len(chart.bins) <= 30
    for column in chart.bins:
        assert LEFT <= column.left < column.left + column.width <= RIGHT
        assert TOP <= column.cut_top <= column.stopped_top <= BOTTOM
    ends = [column.left + column.width for column in chart.bins]
    assert all(end < column.left for end, column in zip(ends, chart.bins[1:], strict=False))


def test_a_column_stands_over_its_number_of_tokens():
    chart = chart_of(texts([3, 3, 7]))
    ticks = {tick.label: tick.at for tick in chart.x_ticks}
    assert [column.words for column in chart.bins] == [
        "3 tokens: 2 finished, 0 cut off",
        "7 tokens: 1 finished, 0 cut off",
    ]
    apart = (ticks["4"] - ticks["2"]) / 2
    for column, tokens in zip(chart.bins, (3, 7), strict=True):
        middle = column.left + column.width / 2
        assert middle == pytest.approx(ticks["2"] + (tokens - 2) * apart, abs=2)


def test_finished_texts_and_cut_ones_are_separate_parts_of_a_column():
    chart = chart_of(texts([4, 4, 4]) + texts([4], stopped=False))
    (column,) = chart.bins
    assert (BOTTOM - column.stopped_top) / (BOTTOM - column.cut_top) == pytest.approx(
        3 / 4, abs=0.01
    )
    assert chart.summary == "4 texts of 4 tokens, median 4; 1 was cut off."


def test_each_kind_has_a_chart_and_its_words():
    examples = texts([1]) + texts([1, 2], kind="answer") + texts([1], kind="pope")
    charts = length_charts(examples)
    assert [chart.title for chart in charts] == ["Captions", "Answers", "Yes or no"]
    labels = {a.get("aria-label") for a in render(examples=examples).named("svg")}
    assert {f"Number of tokens, {c.title.lower()}: {c.summary}" for c in charts} <= labels
    assert charts[1].summary == "2 texts of 1 to 2 tokens, median 1.5; none was cut off."


def test_all_texts_are_counted_not_only_those_that_are_shown():
    assert chart_of(texts([5] * 1000)).summary.startswith("1,000 texts of 5 tokens")


def test_no_texts_are_no_charts():
    assert length_charts([]) == []
    assert "No texts were generated." in render().texts


def test_stop_rates_stand_beside_their_controls_with_intervals():
    seen = (0.9, 0.8, 1.0)
    scores = {
        "captions": section("stop_rate", seen, **LOW),
        "pretrain_only": {"captions": section("stop_rate", seen, **LOW)},
        "answers": section("stop_rate", seen, **LOW),
        "pope": {"random": section("stop_rate", seen, **LOW), "popular": {"accuracy": 0.5}},
    }
    rates = stop_rates(scores)
    assert list(rates) == [
        "Captions", "Captions of stage 1 alone", "Answers", "Yes or no, random",
    ]  # fmt: skip
    for bars in rates.values():
        assert [bar.width for bar in bars] == [90, 30, 20, 10]
        assert [bar.low for bar in bars] == [80, 20, 10, 0]
    assert len(render(scores=scores).of_class("whisker")) >= 4 * 4


def test_loss_lines_keep_within_the_axes_and_fall_with_the_loss():
    rows = [{"step": n, "loss": 5 / (n + 1), "validation_loss": ""} for n in range(1001)]
    rows[-1] |= {"validation_loss": 0.5}
    chart = loss_chart(rows)
    assert len(chart.train) <= 400
    assert len(chart.validation) == 1
    xs, ys = zip(*chart.train, strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys)
    assert LEFT <= min(xs) < max(xs) <= RIGHT
    assert TOP <= min(ys) < max(ys) <= BOTTOM
    assert [tick.label for tick in chart.x_ticks] == ["0", "200", "400", "600", "800", "1,000"]
    assert "0.005 at step 1,000" in chart.summary


@pytest.mark.parametrize("loss", [0.0, 2.5, 1e-9, 1e9])
def test_a_single_step_is_a_point_within_the_axes(loss):
    ((x, y),) = loss_chart([{"step": 1, "loss": loss}]).train
    assert LEFT <= x <= RIGHT
    assert TOP <= y <= BOTTOM


def test_rows_without_a_finite_loss_are_no_chart():
    assert loss_chart([{"step": 1, "loss": math.nan}, {"step": 2, "loss": None}, {}]) is None
