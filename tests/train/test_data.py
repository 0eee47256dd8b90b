import pytest

from cache import FeatureStore
from cache.errors import StageError
from train.data import (
    FEATURES,
    Example,
    held_out_images,
    pairs,
    read_caption_examples,
    read_conversation_examples,
    read_questions,
    with_features,
)
from train.prompts import caption_text, conversation_text

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
    assert read_caption_examples("train") == [
        Example(3, (caption_text("b"),)),
        Example(7, (caption_text("c"), caption_text("a"))),
    ]
    assert [e.image_id for e in read_caption_examples("val")] == [3, 9]
    assert read_caption_examples("test") == []


@pytest.mark.usefixtures("index")
def test_conversations_of_a_split_come_grouped_by_image():
    assert read_conversation_examples("train") == [
        Example(3, (conversation_text(TWO),)),
        Example(7, (conversation_text(ONE), conversation_text(TWO))),
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


def examples(known, unknown):
    """Examples of so many images that the store has (repeated) and has not."""
    return [Example(100 + n % 40, ()) for n in range(known)] + [
        Example(9000 + n, ()) for n in range(unknown)
    ]


def test_up_to_half_of_the_images_may_lack_features(workspace):
    store = FeatureStore(FEATURES)
    for known, unknown in ((200, 0), (198, 2), (5, 5), (0, 0)):
        found = with_features(examples(known, unknown), store, "x")
        assert found == examples(known, 0)
    for known, unknown in ((4, 5), (98, 99), (0, 5)):
        text = f"x: {unknown} of {known + unknown} images have no features in data/features"
        with pytest.raises(StageError, match=text):
            with_features(examples(known, unknown), store, "x")


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
