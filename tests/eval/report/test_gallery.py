import dataclasses

import pytest

from eval.report.gallery import GROUP_SIZE, choose_examples, gallery_image_ids
from tests.eval.report.report_page import example, render

MOST = 3 * GROUP_SIZE


def numbers(group):
    return [e.image_id for e in group]


def test_the_worst_come_first_then_the_best_then_some_of_the_rest():
    examples = [example(i, i / 100) for i in range(100)]
    gallery = choose_examples(examples)["caption"]
    assert list(gallery) == ["Worst", "Best", "At random"]
    assert numbers(gallery["Worst"]) == list(range(GROUP_SIZE))
    assert numbers(gallery["Best"]) == list(range(99, 99 - GROUP_SIZE, -1))
    assert set(numbers(gallery["At random"])) < set(range(GROUP_SIZE, 100 - GROUP_SIZE))
    page = render(examples=examples)
    shown = [a["data-score"] for a in page.of_class("example")]
    assert shown[:2] == ["0.0", "0.01"]
    assert len(shown) == MOST


@pytest.mark.parametrize("count", [0, 1, 2, 3, 47, 48, 49, 72, 73, 300])
def test_no_example_is_shown_twice_and_none_is_left_out_without_need(count):
    gallery = choose_examples([example(i, (i * 7 % 13) / 13) for i in range(count)])["caption"]
    chosen = [i for group in gallery.values() for i in numbers(group)]
    assert len(set(chosen)) == len(chosen) == min(count, MOST)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_of_equal_scores_a_random_choice_is_shown(score):
    gallery = choose_examples([example(i, score) for i in range(1000)])["caption"]
    for group in gallery.values():
        assert 250 < sum(numbers(group)) / len(group) < 750


def test_the_choice_does_not_depend_on_the_order():
    examples = [example(i, i % 3, kind="answer") for i in range(200)]
    assert choose_examples(examples) == choose_examples(examples[::-1])


def test_the_pictures_that_the_page_wants_are_those_it_shows():
    examples = [
        example(1000 * n + i, i / 300, kind=kind)
        for n, kind in enumerate(("caption", "answer", "pope"))
        for i in range(300)
    ]
    wanted = gallery_image_ids(examples)
    assert len(wanted) == 3 * MOST
    thumbnails = dict.fromkeys((e.image_id for e in examples), "data:image/jpeg;base64,AA==")
    page = render(examples=examples, thumbnails=thumbnails)
    assert {a["alt"] for a in page.named("img")} == {f"Picture {i}" for i in wanted}


def test_an_example_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        example(1, 0.5).score = 1.0
