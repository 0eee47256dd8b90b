import io
import json
import math
import random
import shutil
import struct
import zipfile
from copy import deepcopy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image
from ruamel.yaml import YAML

from cache.errors import SettingsError
from pipeline.images.source import open_images, read_source
from pipeline.index import KINDS, index
from pipeline.indexing.collect import choose_holdout, split_by_hash, unique_ids
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.settings import Params

NAMES = {"train": [f"{number:012d}.jpg" for number in range(1, 13)], "val": ["000000000100.jpg"]}


def jpeg(seed, size=(8, 6)):
    buffer = io.BytesIO()
    # The comment, because neighbouring reds are one colour in a JPEG.
    comment = str(seed).encode()
    Image.new("RGB", size, (seed % 256, 90, 20)).save(buffer, "JPEG", comment=comment)
    return buffer.getvalue()


def captions_file(names):
    numbers = [int(Path(name).stem) for name in names]
    return {
        "images": [
            {"id": number, "file_name": name} for number, name in zip(numbers, names, strict=True)
        ],
        "annotations": [
            {"id": number * 10 + repeat, "image_id": number, "caption": f"thing {number} \n"}
            for number in numbers
            for repeat in range(2)
        ],
    }


def conversation(number, **changes):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A thing."}]
    return {"id": f"{number}", "image": f"{number:012d}.jpg", "conversations": turns} | changes


class Workspace:
    """Small inputs below the working folder; tests change them and run the stage."""

    def __init__(self):
        self.images = {
            split: {name: jpeg(int(name[:-4])) for name in names} for split, names in NAMES.items()
        }
        self.captions = {split: captions_file(names) for split, names in NAMES.items()}
        self.instruct = [conversation(number) for number in (1, 2, 2, 3, 4, 5)]
        self.instances = None
        self.official = []
        self.settings = {"instruct_holdout": 0.2, "max_reject_rate": 1.0}
        self.seed = 0

    def write(self):
        for split, files in self.images.items():
            self.write_images(split, files)
            Path(f"captions_{split}.json").write_text(json.dumps(self.captions[split]))
        Path("instruct.json").write_text(json.dumps(self.instruct))
        if self.instances is not None:
            Path("instances_val.json").write_text(json.dumps(self.instances))
        if self.official:
            Path("coco_pope_random.json").write_text("\n".join(map(json.dumps, self.official)))

    def write_images(self, split, files):
        with zipfile.ZipFile(f"{split}.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(f"{split}2017/{name}", data)

    def run(self, write=True):
        if write:
            self.write()
        splits = {
            split: {"images": f"{split}.zip", "captions": f"captions_{split}.json"}
            for split in ("train", "val")
        }
        data = {"source": "local", **splits, "instruct": "instruct.json", **self.settings}
        with Path("params.yaml").open("w") as file:
            YAML().dump({"seed": self.seed, "data": data}, file)
        index(Params.read(Path("params.yaml")))


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Workspace()


def table(name):
    return pq.read_table(f"data/index/{name}.parquet").to_pylist()


def reasons(kind):
    return [row["reason"] for row in table("rejected") if row["kind"] == kind]


def counts():
    return json.loads(Path("reports/index.json").read_text())


def published():
    return {path.name: path.read_bytes() for path in Path("data/index").iterdir()}


def test_every_row_agrees_with_the_inputs(space):
    space.run()
    images = table("images")
    assert [row["image_id"] for row in images] == [*range(1, 13), 100]
    assert images[0] == {
        "image_id": 1,
        "split": "train",
        "file_name": NAMES["train"][0],
        "width": 8,
        "height": 6,
        "num_bytes": len(jpeg(1)),
        "source_xxh3": xxhash.xxh3_64_intdigest(jpeg(1)),
    }
    assert table("captions")[-1] == {
        "caption_id": 1001,
        "image_id": 100,
        "split": "val",
        "caption": "thing 100",
    }
    turns = [{"role": "user", "text": "What?"}, {"role": "assistant", "text": "A thing."}]
    names = [(row["conversation_id"], row["image_id"]) for row in table("conversations")]
    assert names == [("1", 1), ("2", 2), ("2#2", 2), ("3", 3), ("4", 4), ("5", 5)]
    assert all(row["turns"] == turns for row in table("conversations"))
    assert counts()["images"] == {
        "read": 13,
        "kept": 13,
        "rejected": 0,
        "reasons": {},
        "splits": {"train": 12, "val": 1},
    }


def instances_file():
    nouns = ("dog", "apple", "cat")
    return {
        "images": [{"id": 100, "file_name": NAMES["val"][0]}],
        "annotations": [{"image_id": image_id, "category_id": 0} for image_id in (1, 100, 100)],
        "categories": [{"id": number, "name": noun} for number, noun in enumerate(nouns)],
    }


def official(number, image_id, **changes):
    question = {"question_id": number, "image": f"COCO_val2014_{image_id:012d}.jpg"}
    return question | {"text": "Is there a dog in the image?", "label": "yes"} | changes


def test_yes_no_questions_are_made_and_collected(space):
    space.instances = instances_file()
    space.official = [official(2, 100), official(1, 3), official(3, 77)]
    space.run()
    rows = table("pope")
    assert [(row["subset"], row["question_id"], row["image_id"], row["label"]) for row in rows] == [
        ("adversarial", "adversarial/100/1", 100, "yes"),
        ("adversarial", "adversarial/100/2", 100, "no"),
        ("official random", "official random/2", 100, "yes"),
        ("official random", "official random/1", 3, "yes"),
        ("popular", "popular/100/1", 100, "yes"),
        ("popular", "popular/100/2", 100, "no"),
        ("random", "random/100/1", 100, "yes"),
        ("random", "random/100/2", 100, "no"),
    ]
    assert {row["question"] for row in rows if row["label"] == "yes"} == {
        "Is there a dog in the image?"
    }
    assert counts()["objects"] == {"read": 6, "kept": 6, "rejected": 0, "reasons": {}}
    assert counts()["pope"] == {
        "read": 3,
        "kept": 2,
        "rejected": 1,
        "reasons": {"image not in the index": 1},
        "files": ["instances_val.json", "coco_pope_random.json"],
        "subsets": {"adversarial": 2, "official random": 2, "popular": 2, "random": 2},
    }
    assert reasons("pope") == ["image not in the index: 77"]


def cut_by_hash(space, **settings):
    """Let both splits name the images of train."""
    space.settings |= {"split": "hash", "val_share": 0.3, "val": ONE_SET} | settings


ONE_SET = {"images": "train.zip", "captions": "captions_train.json"}
CUT = {i: split_by_hash(i, 0.3) for i in range(1, 13)}
IN_VAL = {i for i, split in CUT.items() if split == "val"}


def splits_of(name):
    return {row["image_id"]: row["split"] for row in table(name)}


def test_one_set_is_cut_by_hash_and_its_texts_follow(space):
    cut_by_hash(space, instruct_holdout=0)
    space.instruct = [conversation(number) for number in range(1, 13)]
    Path("instances_train.json").write_text(
        json.dumps(
            instances_file()
            | {"annotations": [{"image_id": i, "category_id": 0} for i in range(1, 13)]}
        )
    )
    space.run()
    assert 0 < len(IN_VAL) < 12
    assert splits_of("images") == CUT
    assert counts()["images"]["read"] == counts()["images"]["kept"] == 12
    assert [(row["image_id"], row["split"]) for row in table("captions")] == [
        (i, split) for i, split in CUT.items() for _ in range(2)
    ]
    held_out = {i for i, split in splits_of("conversations").items() if split == "holdout"}
    assert held_out == IN_VAL
    assert {row["image_id"] for row in table("pope")} == IN_VAL
    data = Params.read(Path("params.yaml")).section("data", DataSettings)
    source = open_images(read_source(), data)
    assert [source.read(i) for i in CUT] == list(space.images["train"].values())


def test_one_set_with_its_annotations_alone_makes_a_whole_index(space):
    cut_by_hash(space, instruct_holdout=0, instruct="instances_train.json")
    images = [{"id": int(Path(name).stem), "file_name": name} for name in NAMES["train"]]
    annotations = [{"image_id": i, "category_id": i % 2} for i in range(1, 13)]
    made = instances_file() | {"images": images, "annotations": annotations}
    Path("instances_train.json").write_text(json.dumps(made))
    space.run()
    found = table("conversations")
    assert len(found) == 12 * (1 + 2)
    assert {r["image_id"] for r in found if r["split"] == "holdout"} == IN_VAL
    assert table("rejected") == []
    assert counts()["objects"]["read"] == 15


def test_a_share_of_the_images_of_train_is_held_out_of_one_set_too(space):
    cut_by_hash(space, instruct_holdout=0.5)
    space.instruct = [conversation(number) for number in range(1, 13)]
    space.run()
    held_out = {i for i, split in splits_of("conversations").items() if split == "holdout"}
    assert held_out > IN_VAL
    assert len(held_out) < 12


@pytest.mark.parametrize("change", ["seed", "fewer images", "order"])
def test_neither_seed_nor_other_images_change_the_split_of_an_image(space, change):
    cut_by_hash(space)
    if change == "seed":
        space.seed = 5
    elif change == "order":
        space.captions["train"]["images"].reverse()
    else:
        del space.images["train"][NAMES["train"][0]]
        space.captions["train"] = captions_file(NAMES["train"][1:])
    space.run()
    found = splits_of("images")
    assert len(found) == 12 - (change == "fewer images")
    assert found == {i: CUT[i] for i in found}


def test_an_image_that_only_a_conversation_names_is_cut_by_its_id(space):
    cut_by_hash(space)
    unlisted = range(200, 230)
    for i in unlisted:
        space.images["train"][f"{i:012d}.jpg"] = jpeg(i)
    space.instruct = [conversation(i) for i in unlisted]
    space.run()
    found = splits_of("images")
    wanted = {i: split_by_hash(i, 0.3) for i in unlisted}
    assert {i: found[i] for i in unlisted} == wanted
    assert {"train", "val"} == set(wanted.values())
    in_val = {i for i in unlisted if wanted[i] == "val"}
    assert in_val <= {i for i, s in splits_of("conversations").items() if s == "holdout"}


def test_the_copy_of_a_val_image_is_not_learned_from(space):
    cut_by_hash(space, instruct_holdout=0)
    original, copy = min(IN_VAL), min(set(CUT) - IN_VAL)
    files, names = space.images["train"], NAMES["train"]
    files[names[copy - 1]] = files[names[original - 1]]
    space.instruct = [conversation(number) for number in range(1, 13)]
    space.run()
    held_out = {i for i, split in splits_of("conversations").items() if split == "holdout"}
    assert held_out == IN_VAL | {copy}


@pytest.mark.parametrize(("share", "says"), [(0, "puts 0 of 12"), (1, "puts 12 of 12")])
def test_a_cut_without_two_sides_is_refused_with_its_numbers(space, share, says):
    cut_by_hash(space, val_share=share)
    with pytest.raises(StageError, match=f"data.split: hash {says} images.*data.val_share"):
        space.run()
    assert not Path("data/index").exists()


@pytest.mark.parametrize("other", [{"images": "val.zip"}, {"captions": "captions_val.json"}])
def test_two_sets_are_not_cut_by_hash(space, other):
    cut_by_hash(space, val=ONE_SET | other)
    with pytest.raises(SettingsError, match="val must be null or name the same images"):
        space.run()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_val_is_a_share(space, share):
    cut_by_hash(space, val_share=share)
    with pytest.raises(SettingsError, match="val_share is"):
        space.run()


def test_without_question_files_the_table_is_empty_and_the_report_says_why(space):
    space.run()
    assert table("pope") == []
    assert counts()["pope"] == {
        "read": 0,
        "kept": 0,
        "rejected": 0,
        "reasons": {},
        "files": [],
        "subsets": {},
        "why_empty": "neither instances_val.json nor coco_pope_*.json is in .",
    }


def test_questions_about_other_images_are_no_fault(space, capsys):
    space.settings["max_reject_rate"] = 0.0
    space.official = [official(number, 77) for number in range(50)]
    space.run()
    assert counts()["pope"]["rejected"] == len(reasons("pope")) == 50
    assert ", 0 yes-no questions kept, 0 records rejected" in capsys.readouterr().out


def test_damaged_question_files_are_found_before_any_image_is_read(space):
    space.write()
    Path("instances_val.json").write_text('{"annotations": [')
    Path("train.zip").write_bytes(b"no zip")
    with pytest.raises(StageError, match=r"instances_val\.json: not usable JSON"):
        space.run(write=False)


def test_two_runs_are_byte_identical_whatever_the_order_of_the_inputs(space):
    space.run()
    first = published()
    space.run()
    assert published() == first
    random.Random(0).shuffle(space.captions["train"]["images"])
    random.Random(1).shuffle(space.captions["train"]["annotations"])
    space.run()
    assert published() == first
    assert set(first) == {f"{name}.parquet" for name in (*KINDS, "pope", "rejected")}
    assert not Path(".work/index").exists()


@pytest.mark.parametrize("target", ["disk", "nothing"])
def test_a_link_in_place_of_the_index_is_replaced_and_what_it_leads_to_is_kept(space, target):
    space.run()
    shutil.rmtree("data/index")
    Path("disk").mkdir()
    Path("disk/mine.txt").write_text("x")
    Path("data/index").symlink_to(f"../{target}")
    for _ in range(2):
        space.run()
        assert [path.name for path in Path("data").glob("*index*")] == ["index"]
        assert Path("data/index/images.parquet").exists()
    assert [path.name for path in Path("disk").iterdir()] == ["mine.txt"]


def test_a_folder_of_images_gives_the_same_tables_as_a_zip(space):
    space.run()
    first = published()
    for split in ("train", "val"):
        Path(f"{split}.zip").unlink()
        Path(f"{split}.zip").mkdir()
        for name, data in space.images[split].items():
            Path(f"{split}.zip", name).write_bytes(data)
    space.run(write=False)
    assert published() == first


def damaged(value, dice):
    """Return a JSON value with one place in it changed to something odd."""
    odd = [None, True, -1, 2**70, 1.5, "", "../x.jpg", "\ud800", [], {}, "<image>", 3, "7"]
    if isinstance(value, dict | list) and value and dice.random() < 0.85:
        changed = deepcopy(value)
        place = dice.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if dice.random() < 0.1:
            del changed[place]
        else:
            changed[place] = damaged(value[place], dice)
        return changed
    return dice.choice(odd)


def broken(records, dice):
    changed = [damaged(record, dice) if dice.random() < 0.4 else record for record in records]
    return changed + [record for record in records if dice.random() < 0.1]


@pytest.mark.parametrize("seed", range(12))
def test_the_counts_add_up_however_the_records_are_broken(space, seed):
    dice = random.Random(seed)
    for split in ("train", "val"):
        for records in space.captions[split].values():
            # One stays whole, because a file without any is an error of another kind.
            records[1:] = broken(records[1:], dice)
        for name in list(space.images[split]):
            if dice.random() < 0.2:
                space.images[split][name] = dice.choice([b"", b"<html>", jpeg(1)[:50], jpeg(9)])
    space.images["train"][NAMES["train"][0]] = jpeg(1)
    space.instruct = broken(space.instruct, dice)
    space.run()
    read = {
        "images": sum(len(file["images"]) for file in space.captions.values()),
        "captions": sum(len(file["annotations"]) for file in space.captions.values()),
        "conversations": len(space.instruct),
    }
    assert len(table("rejected")) > 0
    for kind in KINDS:
        found = counts()[kind]
        adopted = found["read"] - read[kind]
        assert adopted == 0 or kind == "images"
        assert found["read"] == found["kept"] + found["rejected"]
        assert found["kept"] == len(table(kind)) == sum(found["splits"].values())
        assert found["rejected"] == len(reasons(kind)) == sum(found["reasons"].values())
    known = {row["image_id"] for row in table("images")}
    assert {row["image_id"] for row in table("captions") + table("conversations")} <= known
    for kind, column in zip(KINDS, ("image_id", "caption_id", "conversation_id"), strict=True):
        # Of captions, the ids are those of their file, which the split tells apart.
        identities = [(kind == "captions" and row["split"], row[column]) for row in table(kind)]
        assert len(set(identities)) == len(identities)
    places = [(row["kind"], row["record"]) for row in table("rejected")]
    assert len(set(places)) == len(places)


def test_images_that_cannot_be_used_say_why(space):
    bad = space.images["train"]
    bad[NAMES["train"][1]] = b"<html>not found</html>"
    del bad[NAMES["train"][2]]
    space.captions["train"]["images"].append({"id": 1, "file_name": NAMES["train"][3]})
    space.run()
    twice, no_image, missing, _ = reasons("images")
    names = [f"'train.zip/train2017/{name}'" for name in NAMES["train"]]
    assert reasons("images")[3] == twice
    assert twice == f"image id of two files: 1 is {names[0]} and {names[3]}"
    assert no_image.startswith("not an image: none of the formats")
    assert missing.startswith(f"image missing or unreadable: no file '{NAMES['train'][2]}'")
    assert reasons("captions") == [twice, twice] + [
        f"image unknown or rejected: {number}" for number in (2, 2, 3, 3)
    ]
    assert [reason.partition(":")[0] for reason in reasons("conversations")] == [
        "image rejected",
        "image rejected",
        "image rejected",
        "image missing or unreadable",
    ]


def test_an_image_in_both_splits_stays_in_train_with_the_captions_of_train(space):
    space.captions["val"] = captions_file(["000000000100.jpg", NAMES["train"][0]])
    space.images["val"][NAMES["train"][0]] = jpeg(1)
    space.run()
    assert [row["split"] for row in table("images") if row["image_id"] == 1] == ["train"]
    assert reasons("images") == ["image id repeated: 1"]
    assert {row["split"] for row in table("captions") if row["image_id"] == 1} == {"train"}


def test_each_file_may_number_its_captions_from_one(space):
    for split in ("train", "val"):
        for position, entry in enumerate(space.captions[split]["annotations"]):
            entry["id"] = position + 1
    space.captions["train"]["annotations"][3]["id"] = 1
    space.run()
    assert reasons("captions") == ["caption id repeated: 1"]


def test_images_only_the_conversations_name_are_taken_from_the_archive(space):
    space.images["train"]["000000000077.jpg"] = jpeg(77)
    space.images["train"]["cat.jpg"] = jpeg(78)
    space.images["train"]["000000000079.jpg"] = b"junk"
    space.instruct = [
        conversation(77, image="train2017/000000000077.jpg"),
        conversation(77),
        conversation(1, image="coco/train2017/000000000001.jpg"),
        conversation(78, image="cat.jpg"),
        conversation(79),
        conversation(79),
        conversation(80),
    ]
    space.run()
    cat = xxhash.xxh3_64_intdigest(b"train2017/cat.jpg") >> 1
    assert {row["image_id"] for row in table("images")} == {*range(1, 13), 77, 100, cat}
    assert [row["image_id"] for row in table("conversations")] == [1, 77, 77, cat]
    assert counts()["images"]["read"] == 16
    assert [reason.partition(":")[0] for reason in reasons("conversations")] == [
        "image rejected",
        "image rejected",
        "image missing or unreadable",
    ]


def test_the_holdout_is_the_smallest_hashes_of_its_images(space):
    space.instruct = [conversation(number) for number in [*range(1, 12)] * 2]
    space.seed = 3
    space.run()

    def rank(image_id):
        return xxhash.xxh3_64_intdigest(struct.pack("<qq", 3, image_id))

    expected = set(sorted(range(1, 12), key=rank)[: math.ceil(0.2 * 11)])
    held = {row["image_id"] for row in table("conversations") if row["split"] == "holdout"}
    trained = {row["image_id"] for row in table("conversations") if row["split"] == "train"}
    assert held == expected
    assert held.isdisjoint(trained)


def test_conversations_about_images_of_val_are_never_trained_on(space):
    space.settings["instruct_holdout"] = 0.0
    space.instruct.append(conversation(100))
    space.run()
    splits = {row["image_id"]: row["split"] for row in table("conversations")}
    assert splits == {1: "train", 2: "train", 3: "train", 4: "train", 5: "train", 100: "holdout"}


def test_a_share_is_taken_as_the_decimal_number_it_is_written_as():
    assert len(choose_holdout(range(100), 0.07, 0)) == 7
    assert len(choose_holdout(range(100), 0.0, 0)) == 0
    assert len(choose_holdout(range(3), 0.01, 0)) == 1
    assert choose_holdout(range(50), 0.2, 0) != choose_holdout(range(50), 0.2, 1)


def test_repeated_ids_become_unique_and_never_collide():
    names = ["a", "a", "a#2", "a", "b", "a#2", "a"]
    assert list(unique_ids(names)) == ["a", "a#3", "a#2", "a#4", "b", "a#2#2", "a#5"]


@pytest.mark.parametrize("kind", [*KINDS, "objects", "pope"])
def test_too_many_rejections_fail_name_reasons_and_touch_nothing(space, kind):
    space.run()
    before, report = published(), counts()
    space.settings["max_reject_rate"] = 0.1
    if kind == "images":
        space.captions["train"]["images"][4:6] = [7, {}]
    elif kind == "captions":
        space.captions["train"]["annotations"][:4] = [7, {}, 8, 9]
    elif kind == "objects":
        space.instances = instances_file()
        space.instances["annotations"][:2] = [7, {}]
    elif kind == "pope":
        space.official = [official(1, 100), 7, {}]
    else:
        space.instruct[:3] = [7, {}, 8]
    with pytest.raises(StageError) as error:
        space.run()
    text = str(error.value)
    assert text.startswith(f"{kind}: ")
    assert "data.max_reject_rate allows 0.1" in text
    assert "x not an object (" in text
    assert ".work/index/rejected.parquet" in text
    assert published() == before
    assert counts() == report
    rows = pq.read_table(".work/index/rejected.parquet").to_pylist()
    assert {row["kind"] for row in rows} >= {kind}


def test_no_usable_image_is_an_error_whatever_the_limit(space):
    for files in space.images.values():
        for name in files:
            files[name] = b"junk"
    with pytest.raises(StageError, match=r"not one usable image.*13 x not an image"):
        space.run()
