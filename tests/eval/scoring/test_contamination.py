from pathlib import Path

import pyarrow.parquet as pq
import pytest

from eval.scoring.contamination import ContaminatedImage, IndexedImages, read_images
from workspace.errors import StageError


def test_an_image_is_found_by_its_id_and_by_its_file():
    splits = dict.fromkeys(range(1, 8), "train")
    names = {number: f"{number}.jpg" for number in splits}
    images = IndexedImages(splits, names, {1: 10, 2: 20, 3: 10, 4: 40, 5: 20, 6: 20}, {1, 2, 5, 7})
    assert images.trained_on([6, 3, 2, 4, 3, 7, 99]) == [
        ContaminatedImage(2, "2.jpg", "trained on"),
        ContaminatedImage(3, "3.jpg", "same file as training image 1 (1.jpg)"),
        ContaminatedImage(6, "6.jpg", "same file as training image 2 (2.jpg)"),
        ContaminatedImage(7, "7.jpg", "trained on"),
    ]


def test_an_image_that_the_index_does_not_know_has_no_name():
    images = IndexedImages({}, {}, {}, {1})
    assert images.trained_on([1]) == [ContaminatedImage(1, "", "trained on")]


def test_nothing_is_found_where_nothing_is_shared():
    images = IndexedImages({}, {1: "a", 2: "b"}, {1: 10, 2: 20}, {1})
    assert images.trained_on([2, 3]) == []
    assert IndexedImages({}, {}, {}, ()).trained_on([2, 3]) == []


def test_what_is_trained_on_are_captions_but_of_held_out_images_and_conversations(world):
    images = read_images()
    found = {one.image_id for one in images.trained_on(range(100, 140))}
    assert found == set(range(100, 112)), "116 to 119 have captions in train, and are held out"
    assert images.splits[112] == "val"
    assert images.splits[100] == "train"
    assert images.file_names == {i: f"{i}.jpg" for i in range(100, 140)}


def test_the_same_file_under_another_id_is_found_in_the_index(world):
    table = pq.read_table("data/index/images.parquet")
    rows = table.to_pylist()
    rows[13]["source_xxh3"] = rows[5]["source_xxh3"]
    pq.write_table(type(table).from_pylist(rows, table.schema), "data/index/images.parquet")
    assert read_images().trained_on([112, 113, 114]) == [
        ContaminatedImage(113, "113.jpg", "same file as training image 105 (105.jpg)")
    ]


def test_captions_of_val_and_test_are_not_trained_on(world):
    captions = [(100, "train", "x"), (101, "val", "x"), (102, "test", "x")]
    world.workspace.write_index(captions, [])
    assert read_images().trained == {100}


def test_a_missing_or_damaged_table_is_named(world):
    path = Path("data/index/images.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StageError, match=r"images.parquet: .*Run the index stage"):
        read_images()
    path.unlink()
    with pytest.raises(StageError, match=r"images.parquet: .*Run the index stage"):
        read_images()
