"""docs/scaling.md says what the cost model and the result files say."""

import re

import pytest

from tests.documents.pages import ROOT
from tests.documents.scaling_page import PAGE, TEMPLATE, digits, figures, hours, render


def test_the_page_is_made_from_the_cost_model():
    assert PAGE.read_text() == render(), "python -m tests.documents.measured_tables makes it anew"


def test_every_figure_that_is_computed_stands_in_the_template():
    assert set(re.findall(r"{(\w+)}", TEMPLATE.read_text())) == figures().keys()


def test_every_result_file_that_the_page_links_is_there():
    names = set(re.findall(r"\.\./(bench/results/\w+\.json)", PAGE.read_text()))
    assert len(names) > 5
    assert [name for name in names if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0995, "0.0995"), (1148, "1,150"), (27.43, "27.4"), (999.9, "1,000"), (0, "0")],
)
def test_a_figure_has_three_digits(value, text):
    assert digits(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.001, "< 1 min"), (0.5, "30 min"), (20, "20 h"), (72, "3.0 days")]
)
def test_hours_are_shown_in_a_unit_that_fits(value, text):
    assert hours(value) == text
