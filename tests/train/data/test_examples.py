import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.train.conftest import examples_of
from cache import FeatureStore
from workspace.errors import StageError
from train.data.examples import Example, Examples, held_out_images, pairs, read_caption_examples, read_conversation_examples, read_questions, with_features
from workspace.paths import FEATURES
from train.data.prompts import caption_turns, conversation_turns

ONE = [("where", "here"), ("how many", "two")]
TWO = [("is it red", "no")]


@pytest.fixture
def index(workspace):
    workspace.write_index(
        captions=[
            (7, "train", "c"), (7, "train", "a"), (3, "train", "b"),
            (3, "val", "x"), (9, "val", "y"),
        ],
        conversations=[
            (7, "train", ONE), (3, "train", TWO), (7, "train", TWO), (8, "holdout", ONE),
        ],
    )  # fmt: skip
    return workspace


@pytest.mark.usefixtures("index")
def test_captions_of_a_split_come_grouped_by_image():
    assert list(read_caption_examples("train")) == [
        Example(3, (caption_turns("b"),)),
        Example(7, (caption_turns("c"), caption_turns("a"))),
    ]
    assert [e.image_id for e in read_caption_examples("val")] == [3, 9]
    assert list(read_caption_examples("test")) == []


@pytest.mark.usefixtures("index")
def test_conversations_of_a_split_come_grouped_by_image():
    assert list(read_conversation_examples("train")) == [
        Example(3, (conversation_turns(TWO),)),
        Example(7, (conversation_turns(ONE), conversation_turns(TWO))),
    ]
    assert [e.image_id for e in read_conversation_examples("holdout")] == [8]


@pytest.mark.usefixtures("index")
def test_every_turn_is_a_question_of_its_own():
    found = [(q.image_id, q.question, q.answer) for q in read_questions("train")]
    assert found == [(7, *ONE[0]), (7, *ONE[1]), (3, *TWO[0]), (7, *TWO[0])]
    assert len(read_questions("holdout")) == 2


@pytest.mark.usefixtures("index")
def test_held_out_are_the_images_of_split_holdout():
    assert held_out_images() == {8}


def test_pairs_undoes_alternation():
    turns = [{"role": r, "text": t} for r, t in zip("uaua", "1234", strict=True)]
    assert pairs(turns) == [("1", "2"), ("3", "4")]
    assert pairs([]) == []


def many(num_images=500, seed=0):
    """Examples of images in no order, each with 1 to 7 texts; the same as a list, by hand."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 8, num_images)
    image_ids = rng.permutation(np.repeat(3 * rng.permutation(num_images), counts))
    wanted = [
        Example(i, tuple(caption_turns(str(n)) for n in np.flatnonzero(image_ids == i)))
        for i in sorted(set(image_ids.tolist()))
    ]
    return Examples.grouped(image_ids, lambda number: caption_turns(str(number))), wanted


def test_examples_are_the_list_that_they_stand_for():
    found, wanted = many()
    assert list(found) == wanted
    assert len(found) == len(wanted)
    assert found.image_ids.tolist() == [example.image_id for example in wanted]
    assert found.num_texts.tolist() == [len(example.texts) for example in wanted]
    assert {found.image_ids.dtype, found.num_texts.dtype} == {np.dtype(np.int64)}
    for number in (0, 7, -1, -len(wanted), np.int64(3)):
        assert found[number] == wanted[number]
        assert type(found[number].image_id) is int
    for part in (slice(5), slice(-3, None), slice(2, 90, 7), slice(None, None, -1), slice(9, 2)):
        assert found[part] == wanted[part]
    for number in (len(wanted), -len(wanted) - 1):
        with pytest.raises(IndexError):
            found[number]


def test_examples_can_be_left_out_and_picked():
    found, wanted = many()
    chosen = set(found.image_ids[::3].tolist()) | {-5, 10**9}
    kept = [example for example in wanted if example.image_id not in chosen]
    assert list(found.without(chosen)) == kept
    assert found.without(chosen).num_texts.tolist() == [len(example.texts) for example in kept]
    assert list(found.only(chosen)) == [e for e in wanted if e.image_id in chosen]
    assert list(found.without(set())) == list(found.only(found.image_ids)) == wanted
    assert list(found.only(set())) == list(found.without(found.image_ids)) == []
    assert list(found.without(chosen).without(chosen)[2:4]) == kept[2:4]


@pytest.mark.usefixtures("index")
def test_texts_are_made_when_an_example_is_asked_for(monkeypatch):
    made = []
    monkeypatch.setattr("train.data.examples.caption_turns", lambda text: made.append(text))
    found = read_caption_examples("train")
    assert found.without({3}).num_texts.tolist() == [2]
    assert made == []
    assert found[1].image_id == 7
    assert made == ["c", "a"]


def test_examples_can_be_asked_for_in_several_threads(workspace):
    captions = [(i % 300, "train", f"caption {i}") for i in range(3000)]
    workspace.write_index(captions=captions, conversations=[])
    found, barrier = read_caption_examples("train"), threading.Barrier(4)

    def read(_):
        barrier.wait()
        return list(found)

    with ThreadPoolExecutor(4) as threads:
        first, *others = threads.map(read, range(4))
    assert first[7] == Example(7, tuple(caption_turns(f"caption {i}") for i in range(7, 3000, 300)))
    assert all(other == first for other in others)


def test_an_empty_table_is_no_examples(workspace):
    workspace.write_index(captions=[], conversations=[])
    assert len(read_caption_examples("train")) == len(read_conversation_examples("train")) == 0
    assert read_questions("holdout") == []
    assert held_out_images() == set()


def test_a_table_of_several_row_groups_is_read_as_one(workspace):
    path = workspace.root / "data/index/conversations.parquet"
    wanted, questions = list(read_conversation_examples("train")), read_questions("train")
    pq.write_table(pq.read_table(path), path, row_group_size=3)
    assert pq.ParquetFile(path).num_row_groups > 3
    assert list(read_conversation_examples("train")) == wanted
    assert read_questions("train") == questions
    assert len(wanted) == 12


def examples(known, unknown):
    """Examples of so many images that the store has and has not."""
    text = caption_turns("x")
    image_ids = [*range(100, 100 + known), *range(9000, 9000 + unknown)]
    return examples_of(Example(image_id, (text,)) for image_id in image_ids)


def test_up_to_half_of_the_images_may_lack_features(workspace):
    store = FeatureStore(FEATURES)
    for known, unknown in ((40, 0), (38, 2), (5, 5), (0, 0)):
        found = with_features(examples(known, unknown), store, "x")
        assert list(found) == list(examples(known, 0))
    for known, unknown in ((4, 5), (39, 40), (0, 5)):
        text = f"x: {unknown} of {known + unknown} images have no features in data/features"
        with pytest.raises(StageError, match=text):
            with_features(examples(known, unknown), store, "x")


def test_a_table_without_a_column_is_refused(workspace):
    path = workspace.root / "data/index/captions.parquet"
    pq.write_table(pq.read_table(path).drop_columns("caption"), path)
    with pytest.raises(
        StageError, match=r"captions\.parquet: .*, wanted .*'caption' string.* Run the index"
    ):
        read_caption_examples("train")


@pytest.mark.parametrize("table", ["captions", "conversations"])
def test_a_missing_or_damaged_table_is_named(workspace, table):
    path = workspace.root / f"data/index/{table}.parquet"
    read = {"captions": read_caption_examples, "conversations": read_conversation_examples}[table]
    whole = path.read_bytes()
    for text in (whole[:50], b"", whole[:-100]):
        path.write_bytes(text)
        with pytest.raises(StageError, match=f"{table}.parquet: .* Run the index stage"):
            read("train")
    path.unlink()
    with pytest.raises(StageError, match=f"{table}.parquet: .* Run the index stage"):
        read("train")
