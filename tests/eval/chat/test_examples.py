"""The example pictures of the served page."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from eval.chat.examples import validation_pictures
from tests.eval.picture_world import VAL, make_picture_world
from tests.pipeline.conftest import draw_jpeg


@pytest.fixture(scope="module")
def picture_world(tmp_path_factory, phi_dir):
    return make_picture_world(tmp_path_factory.mktemp("picture_world"), phi_dir)


@pytest.fixture(autouse=True)
def _in_folder(picture_world, monkeypatch):
    monkeypatch.chdir(picture_world.workspace.root)


def test_examples_are_copies_of_files_spread_over_the_set(picture_world, tmp_path):
    found = validation_pictures(picture_world.params(), tmp_path, 3)
    names = [path.name for path in found]
    assert len(set(names)) == 3
    assert set(names) <= {f"{image_id}.jpg" for image_id in VAL}
    for path in found:
        assert path.read_bytes() == draw_jpeg(int(path.stem))


@pytest.mark.parametrize("images", ["nowhere", "nowhere.zip", "params.yaml"])
def test_without_picture_files_there_are_no_examples(picture_world, tmp_path, images):
    params = picture_world.params(data={"val": {"images": images, "captions": "unused"}})
    assert validation_pictures(params, tmp_path, 3) == []


def test_examples_of_a_split_by_hash_come_from_the_images_of_train(picture_world, tmp_path):
    data = {"train": {"images": "data/raw/val.zip"}, "val": None}
    found = validation_pictures(picture_world.params(data=data), tmp_path, 99)
    assert [path.name for path in found] == [f"{image_id}.jpg" for image_id in VAL]


def test_without_an_index_there_are_no_examples(picture_world, tmp_path, monkeypatch):
    params = picture_world.params(data={"val": {"images": str(Path("data/raw/val.zip").resolve()),
                                         "captions": "unused"}})  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert validation_pictures(params, tmp_path, 3) == []


def test_a_damaged_picture_is_no_example(picture_world, tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for image_id in VAL:
        (folder / f"{image_id}.jpg").write_bytes(draw_jpeg(image_id))
    (folder / f"{VAL[0]}.jpg").write_bytes(b"no picture")
    (folder / f"{VAL[1]}.jpg").unlink()
    params = picture_world.params(data={"val": {"images": str(folder), "captions": "unused"}})
    found = validation_pictures(params, tmp_path, 99)
    assert [path.name for path in found] == [f"{image_id}.jpg" for image_id in VAL[2:]]


def test_pictures_of_one_name_in_several_folders_are_all_shown(
    picture_world, tmp_path, monkeypatch
):
    names = ["a/1.jpg", "b/1.jpg"]
    for number, name in enumerate(names):
        path = tmp_path / "val" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(draw_jpeg(number))
    index(tmp_path, pa.table({"file_name": names, "split": ["val"] * 2}))
    params = picture_world.params(
        data={"val": {"images": str(tmp_path / "val"), "captions": "unused"}}
    )
    monkeypatch.chdir(tmp_path)
    shown = tmp_path / "shown"
    shown.mkdir()
    found = validation_pictures(params, shown, 5)
    assert [path.name for path in found] == ["1.jpg", "1.jpg"]
    assert [path.read_bytes() for path in found] == [draw_jpeg(0), draw_jpeg(1)]


def test_a_damaged_index_gives_no_examples(picture_world, tmp_path, monkeypatch):
    params = picture_world.params(data={"val": {"images": str(Path("data/raw/val.zip").resolve()),
                                         "captions": "unused"}})  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = index(tmp_path, pa.table({"file_name": [f"{VAL[0]}.jpg"], "split": ["val"]}))
    assert len(validation_pictures(params, tmp_path, 3)) == 1
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    path.write_bytes(whole[:-footer] + b"\xff" * (footer - 8) + whole[-8:])
    assert validation_pictures(params, tmp_path, 3) == []


def index(root, table):
    (root / "data/index").mkdir(parents=True)
    path = root / "data/index/images.parquet"
    pq.write_table(table, path)
    return path
