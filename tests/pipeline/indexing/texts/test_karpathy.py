import json

import pytest

from pipeline.indexing.captions import read_captions
from workspace.errors import StageError


def image(number, split, folder="val2014", **changes):
    """Return an entry of `images`; a change to ... takes a key away."""
    entry = {
        "filepath": folder,
        "sentids": [10 * number, 10 * number + 1],
        "filename": f"COCO_{folder}_{number:012}.jpg",
        "imgid": number - 100,
        "split": split,
        "sentences": [
            {"tokens": ["a"], "raw": f" a {number}\n{n}.", "imgid": 0, "sentid": 10 * number + n}
            for n in range(2)
        ],
        "cocoid": number,
    } | changes
    return {name: value for name, value in entry.items() if value is not ...}


def read(tmp_path, *images, split="karpathy"):
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images, "dataset": "coco"}))
    return read_captions(path, key="k", split=split)


def test_the_splits_are_those_of_papers(tmp_path):
    folders = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}
    entries = [image(n, split, folders[split]) for n, split in enumerate(folders, start=391)]
    file = read(tmp_path, *entries)
    assert [(i.image_id, i.split) for i in file.images] == [
        (391, "train"),
        (392, "train"),
        (393, "val"),
        (394, "test"),
    ]
    assert file.images[0].file_name == "train2014/COCO_train2014_000000000391.jpg"
    assert file.images[3].file_name == "val2014/COCO_val2014_000000000394.jpg"
    assert [i.other_names for i in file.images] == [(f"{n:012}.jpg",) for n in range(391, 395)]
    assert (file.num_images, file.num_captions) == (4, 8)
    assert not file.rejected


def test_captions_are_the_raw_sentences(tmp_path):
    file = read(tmp_path, image(7, "test"))
    assert [(c.caption_id, c.image, c.caption) for c in file.captions] == [
        (70, 7, "a 7 0."),
        (71, 7, "a 7 1."),
    ]
    assert file.captions[1].record == "dataset_coco.json: images[0].sentences[1]"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"split": "dev"}, "split is none of train, restval, val, test: 'dev'"),
        ({"split": ...}, "no key 'split'"),
        ({"cocoid": "7"}, "key 'cocoid' is not int: str"),
        ({"cocoid": ...}, "no key 'cocoid'"),
        ({"filename": "../a.jpg"}, "bad file name"),
        ({"filepath": ".."}, "bad file name"),
        ({"filepath": 3}, "key 'filepath' is not str: int"),
    ],
)
def test_a_bad_image_is_rejected_with_its_sentences(tmp_path, changes, reason):
    file = read(tmp_path, image(6, "val"), image(7, **{"split": "val"} | changes))
    assert [i.image_id for i in file.images] == [6]
    assert [bad.kind for bad in file.rejected] == ["images", "captions", "captions"]
    assert file.rejected[0].reason.startswith(reason)
    assert file.rejected[1].record == "dataset_coco.json: images[1].sentences[0]"
    assert (file.num_images, file.num_captions) == (2, 4)


@pytest.mark.parametrize("sentences", [[3], [{"sentid": 1}], [{"raw": " ", "sentid": 1}]])
def test_a_bad_sentence_is_rejected(tmp_path, sentences):
    file = read(tmp_path, image(7, "val", sentences=sentences))
    assert (len(file.images), len(file.rejected), file.num_captions) == (1, 1, 1)


def test_an_image_without_sentences_stays(tmp_path):
    file = read(tmp_path, image(6, "val"), image(7, "val", sentences=...))
    assert [i.image_id for i in file.images] == [6, 7]
    assert file.num_captions == 2


def test_flickrs_file_of_the_same_layout_numbers_no_images(tmp_path):
    entry = image(7, "test", cocoid=..., filepath=..., filename="1000092795.jpg")
    file = read(tmp_path, entry)
    (found,) = file.images
    assert (found.image_id, found.file_name, found.other_names) == (None, "1000092795.jpg", ())
    assert found.split == "test"
    assert {c.image for c in file.captions} == {"1000092795.jpg"}


def test_another_division_takes_the_captions_alone_or_refuses(tmp_path):
    assert [i.split for i in read(tmp_path, image(7, "test"), split="hash").images] == [None]
    with pytest.raises(StageError, match=r"k: .*dataset_coco\.json: .*data\.split: karpathy"):
        read(tmp_path, image(7, "test"), split="val2017")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}'),
        ("c.csv", "image,caption\n1.jpg,a\n"),
        ("c.json", '{"images": [], "dataset": "coco"}'),
    ],
)
def test_another_file_is_refused_where_karpathys_splits_are_asked_for(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(StageError, match=rf"k: .*{name}: data\.split is karpathy"):
        read_captions(tmp_path / name, key="k", split="karpathy")
