import io
import json
import zipfile

import pytest
from PIL import Image

from cache.errors import SettingsError
from demo.draw import picture_size
from demo.questions import CAPTION_REQUEST
from demo.scenes import NOUNS
from demo.world import split_scenes, write_world

NUM_TRAIN, NUM_VAL = 60, 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_world(root, NUM_TRAIN, NUM_VAL, seed=3)
    return root


def read(path):
    return json.loads(path.read_text())


def files_below(root):
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_same_seed_gives_same_bytes(world, tmp_path):
    write_world(tmp_path, NUM_TRAIN, NUM_VAL, seed=3)
    names = [path.relative_to(world) for path in files_below(world)]
    assert len(names) == 7
    assert names == [path.relative_to(tmp_path) for path in files_below(tmp_path)]
    for name in names:
        assert (tmp_path / name).read_bytes() == (world / name).read_bytes(), name


def test_another_seed_gives_other_pictures(world, tmp_path):
    write_world(tmp_path, 3, 1, seed=4)
    with zipfile.ZipFile(world / "train2017.zip") as here:
        ours = {here.read(name) for name in here.namelist()}
    with zipfile.ZipFile(tmp_path / "train2017.zip") as there:
        assert not ours & {there.read(name) for name in there.namelist()}


@pytest.mark.parametrize(("split", "num_images"), [("train2017", NUM_TRAIN), ("val2017", NUM_VAL)])
def test_annotated_images_are_the_archive(world, split, num_images):
    images = read(world / "annotations" / f"captions_{split}.json")["images"]
    assert len(images) == num_images
    with zipfile.ZipFile(world / f"{split}.zip") as archive:
        assert archive.namelist() == [f"{split}/{image['file_name']}" for image in images]
        for image in images:
            assert image["file_name"] == f"{image['id']:012d}.jpg"
            data = archive.read(f"{split}/{image['file_name']}")
            with Image.open(io.BytesIO(data)) as picture:
                assert (picture.format, picture.mode) == ("JPEG", "RGB")
                assert picture.size == (image["width"], image["height"])


def test_annotation_files_have_the_official_fields(world):
    captions = read(world / "annotations" / "captions_val2017.json")
    assert set(captions) == {"info", "licenses", "images", "annotations"}
    assert set(captions["images"][0]) == {
        "license",
        "file_name",
        "coco_url",
        "height",
        "width",
        "date_captured",
        "flickr_url",
        "id",
    }
    assert set(captions["annotations"][0]) == {"image_id", "id", "caption"}
    instances = read(world / "annotations" / "instances_val2017.json")
    assert set(instances["annotations"][0]) == {
        "segmentation",
        "area",
        "iscrowd",
        "image_id",
        "bbox",
        "category_id",
        "id",
    }
    assert [category["name"] for category in instances["categories"]] == list(NOUNS)


def test_annotation_ids_are_unique(world):
    for path in sorted((world / "annotations").iterdir()):
        ids = [annotation["id"] for annotation in read(path)["annotations"]]
        assert ids
        assert len(ids) == len(set(ids))


def test_every_image_has_five_different_captions(world):
    content = read(world / "annotations" / "captions_train2017.json")
    by_image = {image["id"]: set() for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].add(annotation["caption"])
    assert {len(texts) for texts in by_image.values()} == {5}


def test_boxes_lie_inside_the_picture_and_match_the_scene(world):
    content = read(world / "annotations" / "instances_train2017.json")
    scenes = split_scenes("train2017", seed=3, first_id=1, num_images=NUM_TRAIN)
    assert len(content["annotations"]) == sum(scene.num_things for scene in scenes.values())
    for annotation in content["annotations"]:
        left, top, width, height = annotation["bbox"]
        picture_width, picture_height = picture_size(scenes[annotation["image_id"]])
        assert left >= 0
        assert top >= 0
        assert left + width <= picture_width
        assert top + height <= picture_height
        assert annotation["area"] == pytest.approx(width * height, abs=0.02)


def test_conversations_are_about_training_images(world):
    conversations = read(world / "llava_instruct_150k.json")
    names = {f"{image_id:012d}.jpg" for image_id in range(1, NUM_TRAIN + 1)}
    assert {record["image"] for record in conversations} == names
    assert all(record["id"] + ".jpg" == record["image"] for record in conversations)
    assert len(conversations) > len(names)


def test_image_marker_opens_or_closes_the_first_turn_and_no_other(world):
    begins = ends = 0
    for record in read(world / "llava_instruct_150k.json"):
        first, *rest = record["conversations"]
        begins += first["value"].startswith("<image>\n")
        ends += first["value"].endswith("\n<image>")
        assert first["value"].count("<image>") == 1
        assert not any("<image>" in turn["value"] for turn in rest)
    assert begins
    assert ends
    assert begins + ends == len(read(world / "llava_instruct_150k.json"))


def test_turns_alternate_and_a_good_share_asks_for_a_caption(world):
    conversations = read(world / "llava_instruct_150k.json")
    asked = 0
    for record in conversations:
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert len(turns) >= 6
        asked += any(CAPTION_REQUEST in turn["value"] for turn in turns)
    assert 0.3 < asked / len(conversations) < 0.8


@pytest.mark.parametrize(("num_train", "num_val"), [(0, 1), (1, 0), (-4, 2)])
def test_a_world_without_images_is_refused(tmp_path, num_train, num_val):
    with pytest.raises(SettingsError, match="wanted 1 or more images"):
        write_world(tmp_path, num_train, num_val, seed=0)
    assert not list(tmp_path.iterdir())
