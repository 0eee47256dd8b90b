import io
import itertools
import json
import random
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image
from ruamel.yaml import YAML

from pipeline.extract import open_images, read_source
from pipeline.images.archives import ImageArchive
from pipeline.index import DataSettings, index
from pipeline.indexing import image_collection
from workspace.errors import StageError
from workspace.settings import Params

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]


def picture(name):
    """A PNG that says by its content which file it is."""
    data = io.BytesIO()
    digits = random.Random(name).randbytes(3)
    Image.new("RGB", (8, 6), tuple(digits)).save(data, "PNG")
    return data.getvalue() + name.encode()


def name_in(data):
    return data.partition(b"IEND")[2][4:].decode()


def write_files(path, files):
    """Write files by name: None gives a file its own picture, bytes are written as they are."""
    path = Path(path)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data or picture(name))
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data or picture(name))


class Run:
    """What the stage makes of some files, lists and conversations."""

    def __init__(self, train, val, listed, conversed, **settings):
        """Run it.

        Args:
            train: Where the images are: folder or zip.
            val: As `train`.
            listed: (id, file name) by split; every image gets a caption that is its name.
            conversed: The image names of the conversations.
            settings: Of section `data`.
        """
        for split, images in listed.items():
            value = {
                "images": [{"id": i, "file_name": name} for i, name in images],
                "annotations": [
                    {"id": n, "image_id": i, "caption": name} for n, (i, name) in enumerate(images)
                ],
            }
            Path(f"captions_{split}.json").write_text(json.dumps(value))
        records = [{"id": name, "image": name, "conversations": TURNS} for name in conversed]
        Path("instruct.json").write_text(json.dumps(records))
        data = {
            "source": "local",
            "train": {"images": train, "captions": "captions_train.json"},
            "val": {"images": val, "captions": "captions_val.json"},
            "instruct": "instruct.json",
            "instruct_holdout": 0.3,
            "max_reject_rate": 1.0,
        } | settings
        with Path("params.yaml").open("w") as file:
            YAML().dump({"seed": 0, "data": data}, file)
        params = Params.read(Path("params.yaml"))
        index(params)
        self.images, self.captions, self.conversations, self.rejected = (
            pq.read_table(f"data/index/{name}.parquet").to_pylist()
            for name in ("images", "captions", "conversations", "rejected")
        )
        self.source = open_images(read_source(), params.section("data", DataSettings))

    @property
    def files(self):
        """Image id to the name of the file that extract opens for it."""
        return {row["image_id"]: name_in(self.source.read(row["image_id"])) for row in self.images}

    @property
    def conversed(self):
        """The name in each conversation to the file that it is tied to."""
        return {
            row["conversation_id"].partition("#")[0]: self.files[row["image_id"]]
            for row in self.conversations
        }

    def reasons(self, kind):
        return [row["reason"] for row in self.rejected if row["kind"] == kind]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


VAL = {"val": [(1000, "v.png")]}


@pytest.fixture
def val():
    write_files("val", {"v.png": None})
    return "val"


@pytest.mark.parametrize("train", ["train", "train.zip"])
@pytest.mark.parametrize(
    ("stored", "listed", "asked"), [*itertools.product(["t/x.png", "x.png"], repeat=3)]
)
def test_texts_find_a_picture_however_they_spell_it(val, train, stored, listed, asked):
    write_files(train, {stored: None})
    run = Run(train, val, {"train": [(7, listed)], **VAL}, [asked, f"coco/{asked}"])
    assert run.files == {7: stored, 1000: "v.png"}
    assert run.conversed == {asked: stored, f"coco/{asked}": stored}
    assert not run.rejected


@pytest.mark.parametrize("both", ["all", "all.zip"])
def test_one_source_may_hold_both_splits(both):
    write_files(both, {"train/1.png": None, "train/2.png": None, "val/3.png": None})
    listed = {"train": [(70, "train/1.png")], "val": [(71, "val/3.png")]}
    run = Run(both, both, listed, ["1.png", "2.png", "3.png"], instruct_holdout=0.0)
    assert run.files == {2: "train/2.png", 70: "train/1.png", 71: "val/3.png"}
    assert [(row["image_id"], row["split"]) for row in run.conversations] == [
        (2, "train"), (70, "train"), (71, "holdout"),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["", ".zip"])
def test_the_name_in_full_wins_in_whatever_split(kind):
    write_files(f"train{kind}", {"a/5.png": None, "b/6.png": None})
    write_files(f"val{kind}", {"5.png": None, "7.png": None})
    listed = {"train": [(50, "a/5.png"), (60, "b/6.png")], "val": [(51, "5.png")]}
    run = Run(f"train{kind}", f"val{kind}", listed, ["5.png", "a/5.png", "6.png"])
    assert run.conversed == {"5.png": "5.png", "a/5.png": "a/5.png", "6.png": "b/6.png"}


@pytest.mark.parametrize("kind", ["", ".zip"])
@pytest.mark.parametrize(
    ("train", "val"),
    [
        ({"a/5.png": None, "b/5.png": None}, {"v.png": None}),
        ({"a/5.png": None}, {"b/5.png": None, "v.png": None}),
        ({"5.png": picture("another"), "a/1.png": None}, {"5.png": None, "v.png": None}),
    ],
    ids=["two folders", "two splits", "two splits, in full"],
)
def test_a_name_of_two_files_is_rejected_with_both(kind, train, val):
    write_files(f"train{kind}", train)
    write_files(f"val{kind}", val)
    run = Run(f"train{kind}", f"val{kind}", {"train": [(9, "5.png")], **VAL}, ["5.png"])
    assert not run.conversations
    (reason,) = run.reasons("conversations")
    places = [f"'train{kind}/{name}'" for name in train if name.endswith("5.png")]
    places += [f"'val{kind}/{name}'" for name in val if name.endswith("5.png")]
    assert reason == f"image name ambiguous: '5.png' may be {places[0]} or {places[1]}"


def test_a_listed_name_with_a_folder_is_not_answered_with_another_folders_file(val):
    write_files("train", {"other/5.png": None, "1.png": None})
    write_files("val", {"val/5.png": None})
    run = Run("train", val, {"train": [(5, "val/5.png"), (1, "1.png")], **VAL}, [])
    assert run.reasons("images") == [
        "image name ambiguous: 'val/5.png' may be 'train/other/5.png' or 'val/val/5.png'"
    ]


def test_two_files_under_one_id_reject_both_and_all_their_texts(val):
    files = ("beach.png", "city.png", "own.png")
    write_files("train", dict.fromkeys(files))
    listed = [(501, "beach.png"), (501, "city.png"), (1, "own.png")]
    run = Run("train", val, {"train": listed, **VAL}, files)
    reason = "image id of two files: 501 is 'train/beach.png' and 'train/city.png'"
    assert run.reasons("images") == run.reasons("captions") == [reason] * 2
    assert run.reasons("conversations") == [
        f"image rejected: {name!r}: {reason}" for name in files[:2]
    ]
    assert run.conversed == {"own.png": "own.png"}


@pytest.mark.parametrize("other", ["val", "gone", "junk"])
def test_the_other_file_of_an_id_may_be_of_val_or_unreadable(val, other):
    write_files("train", {"a.png": None, "b.png": None, "junk.png": b"junk"})
    listed = {"train": [(5, "a.png"), (1, "b.png")], "val": [(1000, "v.png")]}
    listed["val" if other == "val" else "train"].append((5, f"{other[0]}.png"))
    if other == "junk":
        listed["train"][-1] = (5, "junk.png")
    run = Run("train", val, listed, ["a.png"])
    assert 5 not in run.files
    assert not run.conversations
    assert not [row for row in run.captions if row["image_id"] == 5]


@pytest.mark.parametrize("again", ["a.png", "x/a.png", "copy.png"])
def test_the_same_file_may_be_listed_twice(val, again):
    write_files("train", {"a.png": None, "copy.png": picture("a.png")})
    run = Run("train", val, {"train": [(5, "a.png"), (5, again)], **VAL}, ["a.png", again])
    assert run.reasons("images") == ["image id repeated: 5"]
    assert len([row for row in run.captions if row["image_id"] == 5]) == 2
    assert {row["image_id"] for row in run.conversations} == {5}


def test_one_file_never_has_two_ids(val):
    write_files("train", {"a.png": None, "b.png": None})
    listed = [(7, "x/a.png"), (5, "a.png"), (6, "b.png")]
    run = Run("train", val, {"train": listed, **VAL}, ["a.png", "y/a.png"])
    assert run.files == {5: "a.png", 6: "b.png", 1000: "v.png"}
    reason = "image file of two ids: 'train/a.png' is 5 and 7"
    assert run.reasons("images") == run.reasons("captions") == [reason]
    assert {row["image_id"] for row in run.conversations} == {5}


def test_a_picture_without_a_number_of_its_own_has_a_hash_of_its_name(val):
    files = ("1.png", "vg/1.png", "vg/2.png", "city/0901.png", "farm/0901.png", "vg/3.png", "c.png")
    write_files("train", dict.fromkeys(files))
    run = Run("train", val, {"train": [(1, "1.png"), (3, "gone.png")], **VAL}, files)
    hashed = ("vg/1.png", "city/0901.png", "farm/0901.png", "vg/3.png", "c.png")
    assert run.files == {
        1: "1.png",
        2: "vg/2.png",
        1000: "v.png",
        **{xxhash.xxh3_64_intdigest(name.encode()) >> 1: name for name in hashed},
    }
    assert run.conversed == {name: name for name in files}
    assert run.reasons("images") == ["image missing or unreadable: no file 'gone.png' in train"]


def test_other_pictures_and_the_order_of_texts_do_not_change_a_hash(val):
    names = [f"{place}/{n}.png" for place in "abc" for n in range(5)] + ["x.png", "y.png"]
    write_files("train", dict.fromkeys(names))
    listed = {"train": [(77, "x.png")], **VAL}
    run = Run("train", val, listed, names)
    again = Run("train", val, listed, random.Random(3).sample(names, len(names)))
    assert run.files == again.files
    assert set(run.files.values()) == {*names, "v.png"}
    fewer = Run("train", val, listed, [name for name in names if "/4" not in name])
    assert fewer.files.items() <= run.files.items()


def test_two_names_of_one_hash_are_refused_by_name(val, monkeypatch):
    monkeypatch.setattr(image_collection, "hashed_id", len)
    write_files("train", dict.fromkeys(["cat.png", "dog.png", "horse.png"]))
    run = Run("train", val, {"train": [(5, "horse.png")], **VAL}, ["cat.png", "dog.png"])
    reason = "image id of two files: 7 is 'train/cat.png' and 'train/dog.png'"
    assert run.reasons("images") == [reason, reason]
    assert [r.partition(": ")[0] for r in run.reasons("conversations")] == ["image rejected"] * 2
    # A picture with a number keeps it.
    write_files("train", {"bird.png": None})
    run = Run("train", val, {"train": [(8, "horse.png")], **VAL}, ["bird.png"])
    assert run.files[8] == "horse.png"
    assert run.reasons("images") == ["image id of two files: 8 is that of 'train/horse.png'"]


def test_copies_of_one_number_are_one_picture_and_others_are_not(val):
    same = picture("1")
    write_files("train", {"a/1.png": same, "b/1.png": same, "a/2.png": same, "b/2.png": None})
    names = ["b/1.png", "a/1.png", "a/2.png", "b/2.png", "a/../b/1.png"]
    for listed in ([(9, "b/2.png")], [(1, "b/1.png"), (9, "b/2.png")]):
        run = Run("train", val, {"train": listed, **VAL}, names)
        assert {row["image_id"]: row["file_name"] for row in run.images} == {
            1: listed[0][1] if len(listed) > 1 else "a/1.png",
            2: "a/2.png",
            9: "b/2.png",
            1000: "v.png",
        }
        ids = {row["conversation_id"]: row["image_id"] for row in run.conversations}
        assert ids == {"a/1.png": 1, "b/1.png": 1, "a/2.png": 2, "b/2.png": 9}
        assert run.reasons("images") == []


def test_a_picture_of_val_that_no_list_has_is_not_trained_on(val):
    write_files("train", {"1.png": None})
    write_files("val", {"2.png": None})
    run = Run("train", val, {"train": [(1, "1.png")], **VAL}, ["2.png"])
    assert run.reasons("conversations") == [
        "image not listed: 'val/2.png' is of val, whose captions do not list it"
    ]


def test_no_bytes_are_trained_on_and_held_out(val):
    names = [f"{number}.png" for number in range(1, 40)]
    write_files("train", {name: picture(f"{int(name[:-4]) % 20}") for name in names})
    write_files("val", {"v.png": picture("3")})
    listed = {"train": [(int(name[:-4]), name) for name in names], **VAL}
    run = Run("train", val, listed, names)
    files = run.files
    trained, held_out = (
        {files[row["image_id"]] for row in run.conversations if row["split"] == split}
        for split in ("train", "holdout")
    )
    assert trained
    assert "3" in held_out
    assert not trained & held_out


@pytest.mark.parametrize("follow_links", [False, True])
def test_a_link_out_of_the_folder_is_followed_only_if_the_settings_say_so(val, follow_links):
    write_files("outside", {"secret-5.png": None})
    write_files("train", {"1.png": None})
    Path("train/d").symlink_to(Path("outside").absolute())
    listed = {"train": [(1, "1.png"), (5, "d/secret-5.png")], **VAL}
    Path("train/also").symlink_to(Path("outside").absolute())
    asked = ["d/secret-5.png", "also/secret-5.png"]
    run = Run("train", val, listed, asked, follow_links=follow_links)
    if follow_links:
        assert run.files[5] == "secret-5.png"
        assert run.conversed == dict.fromkeys(asked, "secret-5.png")
    else:
        assert 5 not in run.files
        told = [run.reasons("images")[0], *run.reasons("conversations")]
        for name, reason in zip([asked[0], *asked], told, strict=True):
            start = f"image missing or unreadable: file name {name!r} leaves the image root by"
            assert reason.startswith(start)


def test_a_link_that_appears_after_the_index_is_not_followed_by_extract(val):
    write_files("outside", {"5.png": picture("x/5.png")})
    write_files("train", {"x/5.png": None})
    Run("train", val, {"train": [(5, "x/5.png")], **VAL}, [])
    Path("train/x").rename("train/y")
    Path("train/x").symlink_to(Path("outside").absolute())
    source = open_images(
        read_source(), Params.read(Path("params.yaml")).section("data", DataSettings)
    )
    with pytest.raises(StageError, match="leaves the image root by a link to"):
        source.read(5)
    assert name_in(source.read(1000)) == "v.png"


@pytest.mark.parametrize("kind", ["", ".zip"])
def test_every_picture_is_read_once(monkeypatch, kind):
    files = {f"{folder}/{number}.png": None for folder in "ab" for number in range(1, 9)}
    files |= {"c/1.png": None, "d/77.png": None, "e/99.png": b"junk"}
    write_files(f"train{kind}", files)
    write_files(f"val{kind}", {"v.png": None})
    read = []
    original = ImageArchive.read
    monkeypatch.setattr(
        ImageArchive, "read", lambda archive, name: read.append(name) or original(archive, name)
    )
    listed = {"train": [(n, f"a/{n}.png") for n in range(1, 9)], **VAL}
    Run(f"train{kind}", f"val{kind}", listed, [*files, *files, "1.png", "77.png", "99.png"])
    assert len(read) == len(set(read)) == len(files) + 1


@pytest.mark.parametrize("seed", range(15))
def test_no_text_is_ever_tied_to_a_picture_that_it_does_not_name(seed):
    dice = random.Random(seed)
    paths = [f"{folder}{n}.png" for folder in ("", "a/", "a/b/", "c/") for n in range(1, 6)]
    kinds = [dice.choice(["", ".zip"]) for _ in range(2)]
    stored = [dice.sample(paths, 8) for _ in range(2)]
    for split, kind, names in zip(("train", "val"), kinds, stored, strict=True):
        write_files(f"{split}{kind}", {name: picture(f"{split}/{name}") for name in names})
    listed = {
        split: [(dice.randrange(1, 12), dice.choice(paths)) for _ in range(6)]
        for split in ("train", "val")
    }
    for split, names in zip(("train", "val"), stored, strict=True):
        listed[split].append((100 if split == "train" else 200, names[0]))
    asked = [*paths, *(f"z/{n}.png" for n in range(1, 6))]
    run = Run(*(f"{s}{k}" for s, k in zip(("train", "val"), kinds, strict=True)), listed, asked)
    files = run.files
    everything = [
        f"{s}/{n}" for s, names in zip(("train", "val"), stored, strict=True) for n in names
    ]
    for name, file in run.conversed.items():
        exact = [f for f in everything if f.partition("/")[2] == name]
        wanted = exact or [f for f in everything if f.split("/")[-1] == name.split("/")[-1]]
        assert wanted == [file]
    for row in run.captions:
        split, _, full_name = files[row["image_id"]].partition("/")
        assert split == row["split"]
        assert row["caption"].split("/")[-1] == full_name.split("/")[-1]
        names = {name for i, name in listed[split] if i == row["image_id"]}
        assert names == {row["caption"]} or full_name in names
    assert len(set(files.values())) == len(files)
    assert len(run.conversations) + len(run.reasons("conversations")) == len(asked)


@pytest.mark.parametrize("spelling", ["./{}", ".//{}", "././{}"])
@pytest.mark.parametrize("both", ["both", "both.zip"])
def test_however_a_name_is_spelled_a_file_has_one_id_and_one_split(both, spelling):
    write_files(both, {"7.png": None, "v9.png": None})
    listed = {"train": [(1, "7.png")], "val": [(42, "v9.png")]}
    names = [spelling.format("7.png"), spelling.format("v9.png")]
    run = Run(both, both, listed, names)
    assert run.files == {1: "7.png", 42: "v9.png"}
    assert run.conversed == {names[0]: "7.png", names[1]: "v9.png"}
    assert run.rejected == []
