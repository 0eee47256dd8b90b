import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.scoring.questions import choose, choose_evaluation_set


@pytest.mark.parametrize("most", [1, 2, 19, 20, 21, 10**9])
def test_the_choice_keeps_the_order_has_no_repeats_and_depends_on_the_seed(most):
    items = list("abcdefghijklmnopqrst")
    found = choose(items, most, 3)
    assert len(found) == len(set(found)) == min(most, 20)
    assert found == sorted(found) == choose(items, most, 3)
    if most < 20:
        assert any(choose(items, most, seed) != found for seed in range(9))
    assert choose([], most, 3) == []


def test_of_an_image_all_its_yes_no_questions_are_asked_in_every_subset(
    world, limits, prompt_format
):
    rows = [
        {"question_id": f"{s}{i}{n}", "image_id": i, "subset": s, "question": n, "label": label}
        for s in ("popular", "random")
        for i in range(112, 132)
        for n, label in (("cat", "yes"), (f"dog of {s}", "no"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), "data/index/pope.parquet")

    def chosen(seed):
        pope = choose_evaluation_set(limits(pope_images=5), world.store, prompt_format, seed).pope
        assert pope.keys() == {"popular", "random"}
        images = {name: [q.image_id for q in questions] for name, questions in pope.items()}
        assert images["popular"] == images["random"]
        assert [q.label for q in pope["random"]] == ["yes", "no"] * 5
        return images["random"]

    assert len(set(chosen(0))) == 5
    assert chosen(0) == chosen(0)
    assert any(chosen(seed) != chosen(0) for seed in range(1, 5))


def test_an_index_without_yes_no_questions_asks_none(world, limits, prompt_format):
    assert choose_evaluation_set(limits(), world.store, prompt_format, 0).pope == {}


def test_a_question_that_is_too_long_is_left_out_and_counted(world, limits, prompt_format):
    world.workspace.write_index(
        [], [(116, "holdout", [("how " * 200, "two"), ("how many", "two")])]
    )
    work = choose_evaluation_set(limits(), world.store, prompt_format, 0)
    assert [question.question for question in work.questions] == ["how many"]
    assert work.num_too_long == 1


@pytest.mark.parametrize(("split", "image_ids"), [("test", [113, 114]), ("val", [112])])
def test_captions_are_those_of_split_test_where_it_has_any(
    world, limits, prompt_format, split, image_ids
):
    captions = [(112, "val", "a cat"), (113, "test", "a dog"), (114, "test", "a cat")]
    captions = [row for row in captions if split == "test" or row[1] == "val"]
    world.workspace.write_index([(100, "train", "a cat"), *captions], [])
    found = choose_evaluation_set(limits(), world.store, prompt_format, 0)
    assert found.caption_split == split
    assert sorted(found.references) == image_ids
    assert found.num_images["captions"] == len(image_ids)
