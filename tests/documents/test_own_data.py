"""The stories of docs/own_data.md: their commands on small data, and what they print.

No story installs anything: its checkout says that this was done. One story has the tower of the
template, the others that of the demo.
"""

import csv
import json
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest

from tests.checkout import SMALL, change_params, copy_project
from tests.documents.pages import Block, blocks_of, run_commands, section
from tests.documents.test_pages import STORIES
from tests.pipeline.images.packing import write_tar

pytestmark = pytest.mark.slow("runs make mine in four checkouts, with CLIP's ViT-B/32 in one")

CSV, FEATURES, PRETRAIN, SHARDS = (
    "A folder with a CSV",
    "Features alone",
    "LLaVA-Pretrain for stage 1 alone",
    "Webdataset",
)
SHORT = {
    "encoder": SMALL["encoder"],
    "extract": SMALL["extract"],
    "pretrain": {"epochs": 1, "batch_captions": 20, "validation_images": 4, "samples": 0},
    "evaluate": {"caption_images": 6, "caption_tokens": 4},
    "tracking": SMALL["tracking"],
}
VARYING = (r"\(\d+ images/s\)", r"CPU cores: \d+")
"""What differs from machine to machine."""


@pytest.fixture(scope="module")
def pictures(world) -> list[bytes]:
    with zipfile.ZipFile(world / "train2017.zip") as archive:
        return [archive.read(name) for name in sorted(archive.namelist())]


@pytest.fixture(scope="module")
def home(pictures, tmp_path_factory) -> Path:
    """A reader's home with the pictures of all stories."""
    folder = tmp_path_factory.mktemp("home")
    write_csv_story(folder / "pictures", pictures[:40])
    write_features_story(folder / "scans", pictures)
    write_pretrain_story(folder / "LLaVA-Pretrain", pictures)
    write_shards_story(folder / "shards", pictures)
    return folder


def write_csv_story(folder: Path, pictures: list[bytes]) -> None:
    folder.mkdir()
    names = [f"holiday {number}.jpg" for number in range(1, len(pictures) + 1)]
    for name, data in zip(names, pictures, strict=True):
        (folder / name).write_bytes(data)
    with (folder / "captions.csv").open("w", newline="") as file:
        rows = [(name, "a red circle on the left") for name in names]
        csv.writer(file).writerows([("image", "caption"), *rows])


def write_features_story(folder: Path, pictures: list[bytes]) -> None:
    names = ("2019/cat.png", "2020/cat.png", "2020/street.webp")
    for name, data in zip(names, pictures, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_pretrain_story(folder: Path, pictures: list[bytes]) -> None:
    folder.mkdir()
    names = [f"{4537375 + n:09d}.jpg" for n in range(len(pictures) - 1)] + ["004539375.jpg"]
    names = [f"{name[:5]}/{name}" for name in names]
    records = []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name, data in zip(names, pictures, strict=True):
            archive.writestr(name, data)
            question = {"from": "human", "value": "Describe it briefly.\n<image>"}
            answer = {"from": "gpt", "value": "a red circle"}
            record = {"id": Path(name).stem, "image": name, "conversations": [question, answer]}
            records.append(record)
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records))


def write_shards_story(folder: Path, pictures: list[bytes]) -> None:
    folder.mkdir()
    stems = ["cat", "dog", *(f"{number:012d}" for number in range(132, 140))]
    for shard, of_shard in enumerate((pictures[:10], pictures[10:20])):
        files = {}
        names = stems if shard else [stem.replace("139", "140") for stem in stems]
        for stem, data in zip(names, of_shard, strict=True):
            files[f"{stem}.jpg"] = data
            caption = {"caption": "a red circle"}
            text, suffix = (json.dumps(caption), "json") if shard else (caption["caption"], "txt")
            files[f"{stem}.{suffix}"] = text.encode()
        write_tar(folder / f"{shard:05d}.tar", files)


@pytest.fixture(scope="module", autouse=True)
def _on_this_machine_alone(home, tmp_path_factory):
    """No hub, no weights of an earlier download, and an installation that would fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("PYTHON", "false")
        yield


def new_checkout(folder: Path, *, small: bool) -> Path:
    """A checkout that looks installed.

    Args:
        folder: Where to make it.
        small: Takes the demo's tower and language model for those of the template.
    """
    clone = folder / "patchcache"
    copy_project(clone)
    (clone / ".venv").mkdir()
    (clone / ".venv/installed").touch()
    if small:
        change_params(clone, SHORT)
        shutil.copy(clone / "params.yaml", clone / "configs/laptop.yaml")
    return clone


def story(heading: str) -> list[Block]:
    return [block for block in blocks_of(STORIES) if block.heading == heading]


def told(clone: Path, home: Path, heading: str) -> str:
    """Run the blocks of a story in order, check what it shows, and return what was printed."""
    printed = ""
    for block in story(heading):
        if block.language == "sh":
            printed += "".join(run_commands(block.commands, clone))
        elif block.language == "python":
            run_commands([f"python -c {shlex.quote(block.text)}"], clone)
        elif block.text.split("\n")[0].endswith("/"):
            check_layout(block.text, home)
        else:
            check_printed(block.text.replace("/home/me", str(home)), printed)
    return printed


def check_layout(text: str, home: Path) -> None:
    """Every file whose name is shown at the left is there."""
    top, *lines = text.splitlines()
    names = [re.split(r"\s{2,}", line.strip())[0] for line in lines]
    assert names
    assert [name for name in names if not (home / top / name).is_file()] == []


def check_printed(shown: str, printed: str) -> None:
    """The lines that a page shows are printed, in their order."""
    for pattern in VARYING:
        shown, printed = (re.sub(pattern, "...", text) for text in (shown, printed))
    lines = iter(printed.splitlines())
    missing = next((line for line in shown.splitlines() if line not in lines), None)
    assert missing is None, f"{missing}\nis not, in this place, among\n{printed}"


@pytest.mark.parametrize("heading", [CSV, FEATURES, SHARDS])
def test_a_story_runs_as_written(heading, home, tmp_path):
    clone = new_checkout(tmp_path, small=heading != CSV)
    printed = told(clone, home, heading)
    assert "RANDOM weights" in printed
    assert "Next, after source .venv/bin/activate:" in printed
    if heading == SHARDS:
        (block,) = section("Your own images and texts")
        by_name, by_id = run_commands(block.commands, clone)
        assert by_name.count("cat.jpg', split ") == 2
        assert by_id.startswith("image 139: '00001/000000000139.jpg', split ")


def test_the_story_of_pretraining_trains_stage_1_alone(home, tmp_path):
    clone = new_checkout(tmp_path, small=True)
    told(clone, home, PRETRAIN)
    scores = json.loads((clone / "reports/eval.json").read_text())
    assert scores["pretrain_only"]["captions"]["count"] == 6
    assert scores["split"]["name"] == "hash"
    assert json.loads((clone / "reports/finetune.json").read_text())["steps"] == 0


def test_every_block_of_the_page_is_in_a_story():
    told = [block for heading in (CSV, FEATURES, PRETRAIN, SHARDS) for block in story(heading)]
    assert told == blocks_of(STORIES)


def test_make_mine_asks_for_pictures(tmp_path):
    clone = new_checkout(tmp_path, small=True)
    with pytest.raises(AssertionError, match=r"wanted make mine PICTURES=folder"):
        run_commands(["make mine"], clone)


def test_make_hands_on_any_path(home, tmp_path):
    clone = new_checkout(tmp_path, small=True)
    folder = tmp_path / """it's a "#1" `x` & (more) folder: %s"""
    shutil.copytree(home / "pictures", folder)
    captions = tmp_path / "it's.csv"
    (folder / "captions.csv").rename(captions)
    command = shlex.join(["make", "mine", f"PICTURES={folder}", f"CAPTIONS={captions}"])
    (printed,) = run_commands([command], clone)
    assert f"mine: 40 pictures in {folder}\n" in printed
    assert f"in {captions}\n" in printed
    assert "index: 40 images, 40 captions, " in printed
