import pytest

from eval.report.page import MAX_CONTAMINATED
from eval.report.tables import (
    contamination_table,
    pope_table,
    score_tables,
    still_scored,
    type_table,
)
from tests.eval.report.report_page import HOSTILE, LOW, render, section

SEEN = (0.9, 0.8, 1.0)


def test_every_number_of_every_view_is_in_the_tables_with_its_interval():
    scores = {
        "captions": section("BLEU-4", SEEN, **LOW),
        "answers": section("loss", SEEN, **LOW) | {"short_count": 7},
        "pope": {"official random": section("yes_rate", SEEN, **LOW)},
        "pretrain_only": {"captions": section("ROUGE-L", SEEN, **LOW)},
    }
    tables = {table.title: table for table in score_tables(scores)}
    assert list(tables) == [
        "Captions", "Captions of stage 1 alone", "Answers", "Yes or no, official random",
    ]  # fmt: skip
    for table in tables.values():
        assert list(table.columns) == [
            "Model", "Gain over wrong image", "Wrong image", "Noise", "Untrained projector",
        ]  # fmt: skip
    rows = {row.name: row.cells for row in tables["Captions"].rows}
    assert rows == {
        "BLEU-4": [
            ("0.900", "0.800\u20131.000"),
            ("+0.600", "0.400 to 0.800", "p < 0.002"),
            ("0.300", "0.200\u20130.400"),
            ("0.200", "0.100\u20130.300"),
            ("0.100", "0.000\u20130.200"),
        ],
        "Texts": [("100",), ("",), ("100",), ("100",), ("100",)],
    }
    rows = {row.name: row.cells for row in tables["Answers"].rows}
    assert rows["Short targets"] == [("7",), ("",), *[("\u2013",)] * 3]


def test_a_score_without_a_label_stands_under_its_own_key():
    (table,) = score_tables({"captions": section("new_score", SEEN, **LOW)})
    row = next(row for row in table.rows if row.name == "new_score")
    assert row.cells[0] == ("0.900", "0.800\u20131.000")


def test_types_are_ordered_by_frequency_and_show_the_wrong_image_score():
    types = {
        "rare": section("token_f1", SEEN, blind=(0.3, 0.2, 0.4), count=2),
        "often": section("exact_match", SEEN, blind=(0.1, 0.0, 0.2), count=9) | {"short_count": 7},
        "third": section("ROUGE-L", SEEN, count=1),
        "never": {"count": 0, "blind": {"count": 0}},
    }
    table = type_table({"answers": {"token_f1": 0.5, "by_type": types}})
    dash = "\u2013"
    none = (dash, f"wrong image {dash}")
    assert [(row.name, row.cells) for row in table.rows] == [
        ("often", [("9",), ("7",), ("90.0%", "80.0\u2013100.0%", "wrong image 10.0%"), none, none]),
        ("rare", [("2",), (dash,), none, ("90.0%", "80.0\u2013100.0%", "wrong image 30.0%"), none]),
        (
            "third",
            [("1",), (dash,), none, none, ("0.900", "0.800\u20131.000", f"wrong image {dash}")],
        ),
    ]
    assert list(table.columns) == [
        "Questions", "Short targets", "Exact match", "Token F1", "ROUGE-L",
    ]  # fmt: skip


def test_exact_match_over_no_short_target_is_a_dash_everywhere():
    part = section("exact_match", (0.0, 0.0, 0.0), **dict.fromkeys(LOW, (0.0, 0.0, 0.0)))
    part |= {"short_count": 0}
    scores = {"answers": part | {"by_type": {"why": part}}}
    dash = "\u2013"
    (table,) = score_tables(scores)
    rows = {row.name: row.cells for row in table.rows}
    assert rows["Exact match"] == [(dash,), ("",), *[(dash,)] * 3]
    assert type_table(scores).rows[0].cells[1:3] == [("0",), (dash, f"wrong image {dash}")]
    of_older_version = {name: part[name] for name in part if name != "short_count"}
    (table,) = score_tables({"answers": of_older_version})
    assert {row.name: row.cells for row in table.rows}["Exact match"][0][0] == "0.0%"


def test_yes_no_questions_have_a_row_a_subset():
    subsets = {name: section("f1", SEEN, blind=(0.5, 0.4, 0.6)) for name in ("random", "popular")}
    table = pope_table({"pope": subsets | {"adversarial": {"count": 0}}})
    assert list(table.columns) == [
        "Questions", "Accuracy", "Precision", "Recall", "F1", "Yes-rate",
    ]  # fmt: skip
    assert [row.name for row in table.rows] == ["random", "popular"]
    assert table.rows[0].cells[4] == ("90.0%", "80.0\u2013100.0%", "wrong image 50.0%")


@pytest.mark.parametrize("scores", [{}, {"pope": None, "answers": None}, {"pope": {}}])
def test_without_types_and_yes_no_questions_there_are_no_such_tables(scores):
    assert type_table(scores) is pope_table(scores) is contamination_table(scores) is None


def counts(contaminated, left_out):
    return {"images": 300, "contaminated": contaminated, "left_out": left_out}


def test_contamination_is_counted_by_kind():
    scores = {"contamination": {"captions": counts(4, 4), "answers": counts(0, 0)}}
    table = contamination_table(scores)
    assert [(row.name, row.cells) for row in table.rows] == [
        ("Captions", [("300",), ("4",), ("4",)]),
        ("Answers", [("300",), ("0",), ("0",)]),
    ]
    assert still_scored(scores) == 0


def test_scored_pictures_of_the_training_data_are_warned_of():
    scores = {"contamination": {"captions": counts(4, 1), "pope": counts(2, 2)}}
    assert still_scored(scores) == 3
    text = "3 scored pictures are also in the training data."
    assert text in render(scores=scores).texts
    assert text not in render(scores={"contamination": {"captions": counts(4, 4)}}).texts


@pytest.mark.parametrize("count", [1, MAX_CONTAMINATED, MAX_CONTAMINATED + 1, 1234])
def test_the_first_contaminated_images_are_named_and_the_rest_counted(count):
    images = [
        {"image_id": n, "file_name": f"{n}.jpg", "reason": f"{HOSTILE} {n}"} for n in range(count)
    ]
    scores = {"contamination": {"captions": counts(count, count)}}
    page = render(scores=scores, contamination={"captions": images, "pope": []})
    named = [text for text in page.texts if text.startswith(" ".join(HOSTILE.split()))]
    assert len(named) == min(count, MAX_CONTAMINATED)
    assert {f"{n}.jpg" for n in range(min(count, MAX_CONTAMINATED))} <= set(page.texts)
    more = [text for text in page.texts if "more in reports/contamination.json" in text]
    assert more == (
        [f"and {count - MAX_CONTAMINATED:,} more in reports/contamination.json"]
        * (count > MAX_CONTAMINATED)
    )


def test_a_page_that_knows_nothing_of_contamination_says_so():
    text = "No check was made for pictures that are also in the training data."
    assert text in render().texts
    assert text not in render(scores={"contamination": {"captions": counts(0, 0)}}).texts
