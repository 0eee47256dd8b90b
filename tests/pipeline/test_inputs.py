"""The inputs that section `data` names, and the links by which DVC watches them."""

import os
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.input_paths import named_paths
from pipeline.inputs import MAX_FOLDERS, link_inputs
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.settings import Params

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _workspace(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def settings(**data):
    usual = {"source": "local", "instruct_holdout": 0.1, "max_reject_rate": 0.1}
    with Path("params.yaml").open("w") as file:
        YAML().dump({"data": usual | data}, file)
    return Params.read(Path("params.yaml")).section("data", DataSettings)


def write(name, text="x"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def links():
    """The targets of the links to files and to folders."""
    files = {str(path.readlink()) for path in Path("data/inputs/files").glob("[0-9]*")}
    slots = [Path(f"data/inputs/folder_{number + 1}") for number in range(MAX_FOLDERS)]
    return files, [str(path.readlink()) for path in slots if path.is_symlink()]


def test_dvc_depends_on_every_link():
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    folders = [f"data/inputs/folder_{number + 1}" for number in range(MAX_FOLDERS)]
    assert stages["index"]["deps"][2:] == ["data/inputs/files", *folders]


def test_every_input_has_its_settings_key():
    data = settings(
        train={"images": ["a.zip", {"path": "b", "prefix": "p/q"}], "captions": ["c.csv", "d.csv"]},
        val={"images": "e"},
        instruct="f.json",
    )
    assert list(named_paths(data)) == [
        ("data.train.images", "a.zip"),
        ("data.train.images", "b"),
        ("data.train.captions", "c.csv"),
        ("data.train.captions", "d.csv"),
        ("data.val.images", "e"),
        ("data.instruct", "f.json"),
    ]


def test_each_file_and_folder_outside_of_raw_is_linked(tmp_path, capsys):
    for name in (
        "../own/a.zip",
        "../own/pictures/1.jpg",
        "../own/captions.json",
        "data/raw/f.json",
    ):
        write(name)
    write("../own/instances.json")
    write("../own/coco_pope_random.json")
    images = ["../own/a.zip", "../own/pictures"]
    data = settings(
        train={"images": images, "captions": "../own/captions.json"}, instruct="data/raw/f.json"
    )
    link_inputs(data)
    link_inputs(data)
    own = tmp_path / "own"
    beside = ("captions.json", "instances.json", "coco_pope_random.json")
    assert links() == ({str(own / name) for name in ("a.zip", *beside)}, [str(own / "pictures")])
    assert capsys.readouterr().err == ""


def test_a_pattern_stands_for_its_folder(tmp_path):
    write("../own/a/0.tar")
    link_inputs(settings(train={"images": f"{tmp_path}/own/*/[0-9].tar"}))
    assert links() == (set(), [str(tmp_path / "own")])


@pytest.mark.parametrize(
    ("images", "unwatched"),
    [
        ("s3://bucket/pictures", "s3://bucket/pictures"),
        ("..", ""),
        ([f"../own/{number}" for number in range(MAX_FOLDERS + 2)], "own/9"),
    ],
    ids=["url", "holds the workspace", "too many"],
)
def test_what_dvc_cannot_watch_is_named(images, unwatched, capsys):
    for number in range(MAX_FOLDERS + 2):
        write(f"../own/{number}/1.jpg")
    link_inputs(settings(train={"images": images}))
    assert f"{unwatched}: it watches neither" in capsys.readouterr().err
    assert len(links()[1]) == (MAX_FOLDERS if isinstance(images, list) else 0)


def test_dvc_runs_the_index_after_a_change_of_any_input(tmp_path):
    for name in ("../own/pictures/sub/1.jpg", "../own/captions.csv"):
        write(name)
    link_inputs(settings(train={"images": "../own/pictures", "captions": "../own/captions.csv"}))
    stage = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]["index"]
    deps = [path for path in stage["deps"] if path.startswith("data/inputs")]
    with Path("dvc.yaml").open("w") as file:
        YAML().dump({"stages": {"index": {"cmd": "true", "deps": deps}}}, file)

    def dvc(*arguments):
        return subprocess.run(
            ["dvc", *arguments], check=True, capture_output=True, text=True
        ).stdout

    dvc("init", "--no-scm")
    dvc("repro")
    assert "up to date" in dvc("status")
    for name in ("pictures/sub/1.jpg", "pictures/sub/2.jpg", "captions.csv"):
        write(f"../own/{name}", f"new {name}")
        assert "changed deps" in dvc("status")
        dvc("repro")
        assert "up to date" in dvc("status")


def test_long_names_pipes_and_the_folder_of_the_links_hang_nothing(capsys):
    long = f"../{'c' * 250}.csv"
    write(long)
    write("data/mine/a.png")
    os.mkfifo("../pipe")
    link_inputs(settings(train={"images": "data", "captions": [long, "../pipe"]}))
    assert links() == ({str(Path(long).resolve())}, [])
    assert "DVC does not notice changes in" in capsys.readouterr().err


def test_files_among_the_links_are_kept():
    write("data/inputs/mine/a.png")
    with pytest.raises(StageError, match=r"data\.train\.images: data/inputs/mine lies in"):
        link_inputs(settings(train={"images": "data/inputs/mine"}))


@pytest.mark.parametrize(
    "name", ["mine.csv", "mine/a.png", "files/mine.csv", "files/mine/a.png", "folder_2"]
)
def test_what_the_stage_did_not_make_is_kept(name):
    link_inputs(settings(train={"images": ".."}))
    path = Path("data/inputs") / name
    if path.exists():
        path.unlink()
    write(path)
    with pytest.raises(StageError, match="and is not of it"):
        link_inputs(settings(train={"images": ".."}))
    assert path.read_text() == "x"
    assert Path("data/inputs/folder_1").exists()


def test_nothing_is_written_through_a_link_in_place_of_the_folder():
    write("../own/folder_2")
    Path("data").mkdir()
    Path("data/inputs").symlink_to("../../own")
    with pytest.raises(StageError, match=r"data/inputs: no folder"):
        link_inputs(settings(train={"images": ".."}))
    assert [path.name for path in Path("../own").iterdir()] == ["folder_2"]
    assert Path("../own/folder_2").read_text() == "x"


def test_a_run_that_was_killed_is_done_again():
    write("data/inputs/files/about.txt", "Links to")
    write("data/inputs/folder_1", "")
    link_inputs(settings(train={"images": ".."}))
    assert Path("data/inputs/folder_1").read_text() == "unused\n"
