"""The page counts and lists what was answered right without looking."""

import pytest

from eval.report.page import MAX_LISTED
from eval.report.without_sight import without_sight
from tests.eval.report.report_page import HOSTILE, example, render


def answer(image_id, right, **changes):
    fields = {"kind": "answer", "targets": (f"target {image_id}",), "right_without_sight": right}
    return example(image_id, 1.0, **(fields | changes))


def test_only_questions_with_a_right_answer_are_counted():
    texts = [
        answer(1, True),
        answer(2, False),
        answer(3, None),
        answer(4, True),
        answer(5, False, kind="pope", targets=("yes",)),
        example(6, 0.5),
    ]
    answers, yes_no = without_sight(texts)
    assert (answers.title, answers.num_asked, answers.share) == ("Answers", 3, "66.7%")
    assert [text.image_id for text in answers.texts] == [1, 4]
    assert (yes_no.num_asked, yes_no.share, yes_no.texts) == (1, "0.0%", [])


def test_without_a_control_nothing_is_said():
    texts = [answer(1, None), example(2, 1.0)]
    assert without_sight(texts) == []
    assert "without looking" not in " ".join(render(examples=texts).texts)


@pytest.mark.parametrize("more", [0, 1, 7])
def test_the_page_lists_them_and_counts_the_rest(more):
    texts = [answer(number, True) for number in range(MAX_LISTED + more)]
    page = render(examples=texts)
    shown = " ".join(page.texts)
    count = MAX_LISTED + more
    assert f"Answers: {count} of {count} (100.0%) answered right without looking" in shown
    assert page.texts.count("What is it?") >= MAX_LISTED
    assert (f"and {more} more in reports/predictions.parquet" in shown) == (more > 0)


def test_questions_and_answers_are_escaped():
    page = render(examples=[answer(1, True, question=HOSTILE, targets=(HOSTILE,))])
    assert not page.named("img")
