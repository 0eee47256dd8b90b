"""The index of data that lacks parts, or lies in several places, or is split in other ways."""

import csv
import io
import json
import os
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image
from ruamel.yaml import YAML

from cache.errors import SettingsError
from pipeline.images.source import open_images, read_source
from pipeline.index import index
from pipeline.indexing.collect import split_by_hash
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.settings import Params


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_pictures(folder, names):
    for name in names:
        data = io.BytesIO()
        Image.new("RGB", (8, 6), tuple(random.Random(name).randbytes(3))).save(data, "PNG")
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue() + f"{folder}/{name}".encode())


def write_csv(path, *rows):
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def write_instruct(*names, path="instruct.json"):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    records = [{"id": name, "image": name, "conversations": turns} for name in names]
    Path(path).write_text(json.dumps(records))


def run(**data):
    """Run the stage; return the rows of its tables, and the report."""
    usual = {"source": "local", "instruct_holdout": 0, "max_reject_rate": 0}
    with Path("params.yaml").open("w") as file:
        YAML().dump({"seed": 0, "data": usual | data}, file)
    params = Params.read(Path("params.yaml"))
    index(params)
    names = ("images", "captions", "conversations", "rejected")
    tables = {name: pq.read_table(f"data/index/{name}.parquet").to_pylist() for name in names}
    source = open_images(read_source(), params.section("data", DataSettings))
    for row in tables["images"]:
        assert xxhash.xxh3_64_intdigest(source.read(row["image_id"])) == row["source_xxh3"]
    return tables, json.loads(Path("reports/index.json").read_text())


def names_of(tables):
    return sorted(row["file_name"] for row in tables["images"])


def captions_by_name(tables):
    names = {row["image_id"]: row["file_name"] for row in tables["images"]}
    return sorted((names[row["image_id"]], row["caption"]) for row in tables["captions"])


ANIMALS = [f"{n}/{name}.png" for n in "abcde" for name in ("cat", "dog")]


def test_features_only_index_every_picture_and_count_other_files():
    write_pictures("pictures", [*ANIMALS, "loud.PNG"])
    Path("pictures/notes.txt").write_text("no picture")
    Path("pictures/.hidden.png").write_bytes(b"")
    tables, report = run(train={"images": "pictures"})
    assert names_of(tables) == sorted([*ANIMALS, "loud.PNG"])
    assert {row["split"] for row in tables["images"]} == {"train"}
    assert report["images"]["other_files"] == {"txt": 1}
    assert (tables["captions"], tables["conversations"]) == ([], [])


def test_features_only_are_of_every_file_even_of_copies():
    write_pictures("pictures", ["a/1.png", "c.png"])
    for copy in ("b/1.png", "d.png"):
        Path(f"pictures/{copy}").parent.mkdir(exist_ok=True)
        Path(f"pictures/{copy}").write_bytes(Path("pictures/a/1.png").read_bytes())
    tables, report = run(train={"images": "pictures"})
    assert names_of(tables) == ["a/1.png", "b/1.png", "c.png", "d.png"]
    assert report["images"]["read"] == report["images"]["kept"] == 4


def test_a_file_that_only_looks_like_a_picture_is_rejected_and_one_of_another_format_is_not():
    write_pictures("pictures", ["cat.png"])
    Path("pictures/cat.png").rename("pictures/cat.jpg")
    Path("pictures/fake.png").write_bytes(b"no picture")
    tables, _ = run(train={"images": "pictures"}, max_reject_rate=0.5)
    assert names_of(tables) == ["cat.jpg"]
    (rejected,) = tables["rejected"]
    assert rejected["record"] == "train images: fake.png"
    assert rejected["reason"].startswith("not an image: ")
    with pytest.raises(StageError, match=r"images: 1 of 2 rejected.*fake.png"):
        run(train={"images": "pictures"})


def test_a_folder_with_a_csv_is_cut_by_hash_without_a_split_val():
    write_pictures("pictures", ANIMALS)
    rows = [(name, f"a {name}") for name in ANIMALS]
    write_csv("captions.csv", ("image", "caption"), *rows, *[(name, "again") for name in ANIMALS])
    tables, report = run(train={"images": "pictures", "captions": "captions.csv"}, val_share=0.4)
    assert captions_by_name(tables) == sorted([*rows, *[(name, "again") for name in ANIMALS]])
    for row in tables["images"] + tables["captions"]:
        assert row["split"] == split_by_hash(row["image_id"], 0.4)
    assert report["captions"]["splits"].keys() == {"train", "val"}
    write_csv("captions.csv", ("image", "caption"), rows[0])
    with pytest.raises(StageError, match=r"hash puts \d of 1 images into split val"):
        run(train={"images": "pictures", "captions": "captions.csv"})


def test_a_csv_for_each_split_may_share_a_folder():
    write_pictures("pictures", ANIMALS)
    write_csv("train.csv", ("image", "caption"), *[(name, "x") for name in ANIMALS[:6]])
    write_csv("val.csv", ("image", "caption"), *[(name, "x") for name in ANIMALS[6:]])
    write_instruct(*ANIMALS)
    tables, _ = run(
        train={"images": "pictures", "captions": "train.csv"},
        val={"images": "pictures", "captions": "val.csv"},
        instruct="instruct.json",
    )
    splits = {row["file_name"]: row["split"] for row in tables["images"]}
    assert splits == {name: "train" if name in ANIMALS[:6] else "val" for name in ANIMALS}
    held_out = {row["conversation_id"]: row["split"] for row in tables["conversations"]}
    assert held_out == {n: "train" if n in ANIMALS[:6] else "holdout" for n in ANIMALS}


def test_an_image_with_captions_in_both_splits_is_of_train_alone():
    write_pictures("pictures", ["cat.png", "dog.png"])
    write_csv("train.csv", ("image", "caption"), ("cat.png", "x"))
    write_csv("val.csv", ("image", "caption"), ("cat.png", "y"), ("dog.png", "y"))
    tables, _ = run(
        train={"images": "pictures", "captions": "train.csv"},
        val={"images": "pictures", "captions": "val.csv"},
        max_reject_rate=1.0,
    )
    assert captions_by_name(tables) == [("cat.png", "x"), ("dog.png", "y")]
    (rejected,) = tables["rejected"]
    assert rejected["record"].startswith("val.csv: ")


def test_conversations_alone_index_the_pictures_that_they_name():
    write_pictures("pictures", ANIMALS)
    write_instruct(*ANIMALS[:4])
    tables, report = run(train={"images": "pictures"}, instruct="instruct.json")
    assert names_of(tables) == ANIMALS[:4]
    assert report["conversations"]["splits"] == {"train": 4}


def test_pictures_of_a_split_val_without_captions_are_held_out():
    write_pictures("train", ANIMALS[:4])
    write_pictures("val", ANIMALS[4:])
    write_instruct(*ANIMALS)
    tables, _ = run(train={"images": "train"}, val={"images": "val"}, instruct="instruct.json")
    held_out = {
        row["conversation_id"] for row in tables["conversations"] if row["split"] != "train"
    }
    assert held_out == set(ANIMALS[4:])


def test_each_place_has_its_prefix_and_several_files_of_texts_are_one():
    for place in ("coco", "vg"):
        write_pictures(f"{place}_pictures", ["1.png", "2.png", "3.png"])
    write_csv("a.csv", ("image", "caption"), ("coco/train/1.png", "coco 1"), ("vg/1.png", "vg 1"))
    write_csv("b.tsv", ("image\tcaption",), ("vg/2.png\tvg 2",))
    write_instruct("coco/train/2.png", path="one.json")
    write_instruct("vg/2.png", path="two.json")
    tables, _ = run(
        train={
            "images": [
                {"path": "coco_pictures", "prefix": "coco/train"},
                {"path": "vg_pictures", "prefix": "vg/"},
            ],
            "captions": ["a.csv", "b.tsv"],
        },
        val_share=0.5,
        instruct=["one.json", "two.json"],
    )
    assert names_of(tables) == ["coco/train/1.png", "coco/train/2.png", "vg/1.png", "vg/2.png"]
    assert captions_by_name(tables) == [
        ("coco/train/1.png", "coco 1"),
        ("vg/1.png", "vg 1"),
        ("vg/2.png", "vg 2"),
    ]
    assert [row["conversation_id"] for row in tables["conversations"]]


def test_a_name_with_the_folders_of_another_place_means_no_file_of_this_one():
    write_pictures("gqa_pictures", ["1.png", "2.png"])
    images = {"path": "gqa_pictures", "prefix": "gqa/images"}
    write_instruct("vg/1.png", "images/2.png", "1.png")
    tables, _ = run(train={"images": images}, instruct="instruct.json", max_reject_rate=0.5)
    names = {row["image_id"]: row["file_name"] for row in tables["images"]}
    assert {row["conversation_id"]: names[row["image_id"]] for row in tables["conversations"]} == {
        "images/2.png": "gqa/images/2.png",
        "1.png": "gqa/images/1.png",
    }
    (rejected,) = tables["rejected"]
    assert rejected["reason"].startswith("image missing or unreadable: no file 'vg/1.png'")


def test_a_listed_image_without_captions_and_without_a_file_is_rejected():
    write_pictures("pictures", ["1.png", "2.png"])
    listed = karpathy({"train": [1, 2, 3]})["images"]
    for image, name in zip(listed, ("1.png", "2.png", "gone.png"), strict=True):
        image.pop("cocoid")
        image |= {"filename": name, "filepath": "."}
    listed[2]["sentences"] = []
    Path("flickr.json").write_text(json.dumps({"images": listed, "dataset": "flickr8k"}))
    tables, report = run(
        train={"images": "pictures", "captions": "flickr.json"},
        split="karpathy",
        max_reject_rate=0.5,
    )
    assert [row["kind"] for row in tables["rejected"]] == ["images"]
    assert (report["images"]["read"], report["images"]["kept"]) == (3, 2)


def test_one_name_in_two_places_is_refused_unless_a_prefix_tells_them_apart():
    for place in ("a", "b"):
        write_pictures(place, ["1.png", f"only_{place}.png"])
    write_instruct("1.png", "only_a.png", "only_b.png")
    tables, _ = run(train={"images": ["a", "b"]}, instruct="instruct.json", max_reject_rate=1.0)
    assert names_of(tables) == ["only_a.png", "only_b.png"]
    (reason,) = [row["reason"] for row in tables["rejected"] if row["kind"] == "conversations"]
    assert "'1.png' is one file in a and another in b" in reason


def karpathy(names):
    """Karpathy's file about COCO images of these ids, by split."""
    images = [
        {
            "filepath": "val2014",
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "cocoid": number,
            "imgid": number,
            "split": split,
            "sentids": [number],
            "sentences": [{"raw": f"caption {number}", "sentid": number, "tokens": [], "imgid": 0}],
        }
        for split, numbers in names.items()
        for number in numbers
    ]
    return {"images": images, "dataset": "coco"}


KARPATHY = {"train": [1, 2], "restval": [3, 4], "val": [5, 6], "test": [7, 8]}


def named(numbers):
    """The names of pictures in both releases in turn."""
    return [f"COCO_val2014_{n:012d}.jpg" if n % 2 else f"{n:012d}.jpg" for n in numbers]


@pytest.mark.parametrize("release", ["COCO_val2014_{:012d}.jpg", "{:012d}.jpg"])
def test_karpathys_splits_count_and_popes_images_are_kept_out_of_training(release):
    # The pictures' bytes are PNG; only their content says what they are.
    write_pictures("one", [release.format(number) for number in range(1, 6)])
    write_pictures("two", [release.format(number) for number in range(6, 9)])
    Path("dataset_coco.json").write_text(json.dumps(karpathy(KARPATHY)))
    question = {"question_id": 1, "image": "COCO_val2014_000000000003.jpg", "label": "yes"}
    Path("coco_pope_random.json").write_text(json.dumps(question | {"text": "Is it?"}))
    # Conversations may call a picture by its name in the other release.
    write_instruct(*[f"coco/{form}" for form in named(range(1, 9))])
    tables, report = run(
        train={"images": ["one", "two"], "captions": "dataset_coco.json"},
        split="karpathy",
        instruct="instruct.json",
    )
    wanted = {
        1: "train",
        2: "train",
        3: "val",
        4: "train",
        5: "val",
        6: "val",
        7: "test",
        8: "test",
    }
    assert {row["image_id"]: row["split"] for row in tables["images"]} == wanted
    assert {row["image_id"]: row["split"] for row in tables["captions"]} == wanted
    trained = {row["image_id"] for row in tables["conversations"] if row["split"] == "train"}
    assert trained == {1, 2, 4}
    assert len(tables["conversations"]) == 8
    assert report["pope"]["subsets"] == {"official random": 1}


def test_other_captions_are_no_file_of_karpathys():
    write_pictures("pictures", ["1.png"])
    write_csv("captions.csv", ("image", "caption"), ("1.png", "x"))
    with pytest.raises(StageError, match=r"dataset_coco\.json"):
        run(train={"images": "pictures", "captions": "captions.csv"}, split="karpathy")


@pytest.mark.parametrize("prefix", ["/coco", "a/../b", "a//b", "."])
def test_a_prefix_is_a_plain_folder(prefix):
    with pytest.raises(SettingsError, match="wanted folders like coco/train2017"):
        run(train={"images": {"path": "pictures", "prefix": prefix}})


def same_in_any_order(rows, **data):
    """The tables of captions in both orders of their rows, which must be the same."""
    found = []
    for order in (rows, rows[::-1]):
        write_csv("captions.csv", ("image", "caption"), *order)
        tables, _ = run(**data)
        images = [(row["image_id"], row["file_name"]) for row in tables["images"]]
        found.append((images, captions_by_name(tables)))
    assert found[0] == found[1]
    return found[0][1]


def test_the_id_of_a_file_of_several_names_is_the_same_in_any_order_of_texts():
    write_pictures("val", ["v.png"])
    write_csv("val.csv", ("image", "caption"), ("v.png", "v"))
    write_pictures("pictures", ["b/cat.png"])
    Path("pictures/a").symlink_to("b")
    val = {"images": "val", "captions": "val.csv"}
    rows = [("b/cat.png", "1"), ("a/cat.png", "2")]
    wanted = [("a/cat.png", "1"), ("a/cat.png", "2"), ("v.png", "v")]
    train = {"images": "pictures", "captions": "captions.csv"}
    assert same_in_any_order(rows, train=train, val=val) == wanted
    places = [{"path": "pictures/b", "prefix": prefix} for prefix in "ba"]
    train = {"images": places, "captions": "captions.csv"}
    assert same_in_any_order(rows, train=train, val=val) == wanted


def test_a_dot_before_a_name_means_nothing():
    write_pictures("train", ["sub/cat.png"])
    write_pictures("val", ["cat.png"])
    write_csv("val.csv", ("image", "caption"), ("cat.png", "v"))
    rows = [("cat.png", "1"), ("./cat.png", "2")]
    found = same_in_any_order(
        rows,
        train={"images": "train", "captions": "captions.csv"},
        val={"images": "val", "captions": "val.csv"},
    )
    assert found == [("cat.png", "v"), ("sub/cat.png", "1"), ("sub/cat.png", "2")]


def coco(images, captions):
    """COCO's captions of ids and names, and of ids and texts."""
    return json.dumps(
        {
            "images": [{"id": number, "file_name": name} for number, name in images],
            "annotations": [
                {"id": n, "image_id": number, "caption": text}
                for n, (number, text) in enumerate(captions)
            ],
        }
    )


def test_a_caption_belongs_to_an_image_of_its_own_file():
    write_pictures("pictures", ["a.png", "b.png"])
    write_pictures("val", ["v.png"])
    Path("a.json").write_text(coco([(1, "a.png")], [(1, "a"), (2, "of a picture not listed")]))
    Path("b.json").write_text(coco([(2, "b.png")], [(2, "b")]))
    Path("v.json").write_text(coco([(3, "v.png")], [(3, "v")]))
    tables, _ = run(
        train={"images": "pictures", "captions": ["a.json", "b.json"]},
        val={"images": "val", "captions": "v.json"},
        max_reject_rate=0.5,
    )
    assert captions_by_name(tables) == [("a.png", "a"), ("b.png", "b"), ("v.png", "v")]
    assert [row["reason"] for row in tables["rejected"]] == ["image unknown or rejected: 2"]


def test_a_name_that_two_listed_pictures_have_elsewhere_means_neither():
    write_pictures("pictures", ["COCO_train2014_1.jpg", "COCO_val2014_1.jpg", "2.jpg"])
    images = karpathy({"train": [1, 2], "test": [3]})["images"]
    for image, name in zip(images, ("val2014_1", "train2014_1", "val2014_2"), strict=True):
        image |= {"filename": f"COCO_{name}.jpg", "filepath": "."}
    write_instruct("1.jpg", "COCO_val2014_2.jpg")
    for order in (images, images[::-1]):
        Path("dataset_coco.json").write_text(json.dumps({"images": order}))
        tables, _ = run(
            train={"images": "pictures", "captions": "dataset_coco.json"},
            split="karpathy",
            instruct="instruct.json",
            max_reject_rate=1,
        )
        assert [row["image_id"] for row in tables["conversations"]] == [3]
        assert len(tables["rejected"]) == 1


def check_numbers(tables, report):
    for kind in ("images", "captions", "conversations"):
        numbers = report[kind]
        assert numbers["kept"] == len(tables[kind])
        assert numbers["rejected"] == sum(row["kind"] == kind for row in tables["rejected"])
        assert numbers["read"] == numbers["kept"] + numbers["rejected"]


def test_rejected_images_of_a_file_without_ids_are_counted_as_read():
    write_pictures("pictures", ["a.png", "b.png", "c.png"])
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": "x", "sentid": number}]}
        for number, (name, split) in enumerate(
            [("a.png", "train"), ("b.png", "test"), ("c.png", "odd"), ("../d.png", "val")]
        )
    ]
    Path("dataset.json").write_text(json.dumps({"images": images}))
    train = {"images": "pictures", "captions": "dataset.json"}
    tables, report = run(train=train, split="karpathy", max_reject_rate=1)
    check_numbers(tables, report)
    assert report["images"]["read"] == 4


def test_names_that_no_utf8_can_hold_are_rejected_with_an_escape(capsys):
    write_pictures("pictures", ["cat.png", "dog.png"])
    Path("pictures/dog.png").rename(os.fsdecode(b"pictures/\xff.png"))
    Path("pictures", os.fsdecode(b"x.\xfe\x1b[2J")).write_bytes(b"")
    tables, report = run(train={"images": "pictures"}, max_reject_rate=0.5)
    check_numbers(tables, report)
    (bad,) = tables["rejected"]
    assert bad["record"] == "train images: \\udcff.png"
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    printed.encode()
