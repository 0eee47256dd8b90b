"""The settings that `make mine` writes: each choice, what is said of it, and each refusal."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cache.errors import SettingsError
from pipeline import propose as module
from pipeline.index import index
from pipeline.propose import TEMPLATE, choose_weights, propose
from tests.pipeline.images.packing import write_parquet, write_tar
from tests.test_pipeline_definition import SECTIONS
from workspace.data_settings import DataSettings, SplitSettings
from workspace.errors import StageError
from workspace.settings import Params

MINE = Path("mine.yaml")
COLORS = ("red", "green", "blue", "white", "black", "gray", "pink", "brown", "gold", "navy")
NAMES = tuple(f"{color}.png" for color in COLORS)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _random_weights(request, monkeypatch):
    if "weights" not in request.fixturenames:
        monkeypatch.setattr(module, "choose_weights", lambda: "random")


def png(color):
    data = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(data, "PNG")
    return data.getvalue()


def write_pictures(folder="pictures", names=NAMES):
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (Path(folder) / name).write_bytes(png(Path(name).stem))


def write_table(path, names=NAMES, header=("image", "caption"), delimiter=","):
    with Path(path).open("w", newline="") as file:
        rows = [(name, f"the picture {name}") for name in names]
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def data_of(out=MINE):
    return Params.read(out).section("data", DataSettings)


def run_index():
    """Run the stage with the settings that were written; return its report."""
    index(Params.read(MINE))
    return json.loads(Path("reports/index.json").read_text())


def here(name):
    return str(Path.cwd() / name)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_settings_fit_every_section_and_most_are_those_of_the_template(section):
    write_pictures()
    propose("pictures", None, MINE)
    written, template = Params.read(MINE), Params.read(TEMPLATE)
    assert written.seed() == 0
    assert written.section(section, SECTIONS[section])
    if section not in ("data", "fetch"):
        chosen = {"pretrained", "workers", "max_failure_rate"}
        same = [
            {k: v for k, v in p.values[section].items() if k not in chosen}
            for p in (written, template)
        ]
        assert same[0] == same[1]


def test_without_captions_the_index_has_every_picture(capsys):
    write_pictures()
    propose("pictures", None, MINE)
    assert data_of().train == SplitSettings(images=here("pictures"))
    assert "no captions, so features of all pictures" in capsys.readouterr().out
    assert run_index()["images"]["splits"] == {"train": len(NAMES)}


@pytest.mark.parametrize("place", ["beside.csv", "pictures/captions.csv"])
def test_captions_are_those_of_the_named_file_or_of_the_only_one_among_the_pictures(place, capsys):
    write_pictures()
    write_table(place)
    propose("pictures", place if place == "beside.csv" else None, MINE)
    assert data_of().train.captions == here(place)
    assert f"10 captions of 10 pictures in {here(place)}" in capsys.readouterr().out
    report = run_index()
    assert report["captions"]["kept"] == len(NAMES)
    assert report["images"]["splits"].keys() == {"train", "val"}


def write_jsonl(path):
    rows = [{"file_name": name, "text": "x"} for name in NAMES]
    Path(path).write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metadata.csv", lambda path: write_table(path, header=("file_name", "text"))),
        ("metadata.jsonl", write_jsonl),
        ("captions.txt", write_table),
        ("Captions.TSV", lambda path: write_table(path, delimiter="\t")),
        ("my words.csv", lambda path: write_table(path, delimiter=";")),
        (
            "captions.parquet",
            lambda path: pq.write_table(pa.table({"image": NAMES, "caption": NAMES}), path),
        ),
    ],
)
def test_captions_among_the_pictures_are_found_under_the_names_that_people_use(name, write):
    write_pictures()
    write(f"pictures/{name}")
    propose("pictures", None, MINE)
    assert data_of().train.captions == here(f"pictures/{name}")


def test_a_table_of_another_name_counts_only_where_none_has_a_usual_name(capsys):
    write_pictures()
    write_table("pictures/captions.csv")
    write_table("pictures/older.csv")
    propose("pictures", None, MINE)
    assert data_of().train.captions == here("pictures/captions.csv")
    Path("pictures/captions.csv").rename("pictures/newer.csv")
    propose("pictures", None, MINE)
    assert data_of().train.captions is None
    said = capsys.readouterr().out
    assert (
        f"name one with CAPTIONS: {here('pictures/newer.csv')}, {here('pictures/older.csv')}"
        in said
    )


def test_a_table_that_holds_no_captions_is_named_with_the_reason(capsys):
    write_pictures()
    write_table("pictures/metadata.csv", header=("file_name", "label"))
    (Path("pictures") / ".captions.csv").write_text("hidden")
    propose("pictures", None, MINE)
    assert data_of().train.captions is None
    (said,) = re.findall("mine: not taken for captions: .*", capsys.readouterr().out)
    assert "metadata.csv" in said
    assert said.endswith("it has 'file_name', 'label'.")


def test_captions_behind_a_link_out_of_the_folder_are_taken_only_by_name(capsys):
    write_pictures()
    write_table("private.csv")
    write_table("pictures/table.csv")
    Path("pictures/captions.csv").symlink_to("../private.csv")
    Path("pictures/metadata.csv").symlink_to("table.csv")
    propose("pictures", None, MINE)
    assert "captions.csv, a link out of the folder; CAPTIONS=" in capsys.readouterr().out
    assert data_of().train.captions == here("pictures/metadata.csv")
    propose("pictures", "pictures/captions.csv", MINE)
    assert data_of().train.captions == here("pictures/captions.csv")


def test_a_text_beside_each_picture_is_no_table(capsys):
    write_pictures()
    for number in range(module.MAX_CANDIDATES + 1):
        Path(f"pictures/{number}.txt").write_text("image,caption\nred.png,x\n")
    propose("pictures", None, MINE)
    assert data_of().train.captions is None
    assert "not taken" not in capsys.readouterr().out


@pytest.mark.parametrize("num_pictures", range(2, 8))
def test_a_handful_of_pictures_is_in_both_splits(num_pictures):
    write_pictures(names=NAMES[:num_pictures])
    write_table("pictures/captions.csv", NAMES[:num_pictures])
    propose("pictures", None, MINE)
    assert run_index()["images"]["splits"].keys() == {"train", "val"}


def test_a_share_is_tried_only_for_a_handful(monkeypatch):
    write_pictures()
    write_table("captions.csv")
    monkeypatch.setattr(module, "HANDFUL", len(NAMES) - 1)
    monkeypatch.setattr(module, "split_by_hash", None)
    propose("pictures", "captions.csv", MINE)
    assert data_of().val_share == 0.2


def test_the_captions_of_a_single_picture_are_left_out(capsys):
    write_pictures(names=["red.png"])
    write_table("pictures/captions.csv", ["red.png"])
    propose("pictures", None, MINE)
    assert "the captions are left out" in capsys.readouterr().out
    assert run_index()["images"]["kept"] == 1


def test_captions_that_cannot_be_used_are_counted_and_too_many_are_refused_at_once(capsys):
    write_pictures()
    write_table("captions.csv", [*NAMES, "elsewhere.png"])
    propose("pictures", "captions.csv", MINE)
    printed = capsys.readouterr().out
    assert "mine: 10 captions of 10 pictures in" in printed
    assert "captions.csv; 1 others cannot be used" in printed
    assert "have no caption" not in printed
    assert run_index()["captions"]["rejected"] == 1
    write_table("captions.csv", NAMES[:7])
    propose("pictures", "captions.csv", MINE)
    assert "mine: 3 pictures have no caption, and get no features" in capsys.readouterr().out
    MINE.unlink()
    write_table("captions.csv", [*NAMES, "elsewhere.png", "nowhere.png"])
    with pytest.raises(SettingsError, match=r"2 of 12 captions cannot.*no file 'elsewhere.png'"):
        propose("pictures", "captions.csv", MINE)
    assert not MINE.exists()


@pytest.mark.parametrize("annotations", ["", "annotations/"])
@pytest.mark.parametrize("instruct", [None, "llava_instruct_150k.json"])
def test_cocos_layout_is_known_by_its_names(annotations, instruct, capsys):
    for split, names in (("train", NAMES[:8]), ("val", NAMES[8:])):
        write_pictures(f"coco/{split}2017", names)
        images = [{"id": NAMES.index(name), "file_name": name} for name in names]
        texts = [{"id": i["id"], "image_id": i["id"], "caption": "a color"} for i in images]
        path = Path(f"coco/{annotations}captions_{split}2017.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"images": images, "annotations": texts}))
    if instruct:
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A color."}]
        records = [{"id": name, "image": name, "conversations": turns} for name in NAMES]
        Path(f"coco/{instruct}").write_text(json.dumps(records))
    propose("coco", None, MINE)
    report = run_index()
    assert report["captions"]["splits"] == {"train": 8, "val": 2}
    assert report["conversations"]["kept"] == (10 if instruct else 0)
    assert "mine: COCO's layout in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        'it\'s "quoted"',
        "a # no comment",
        "key: value",
        "{a, b}",
        "back\\slash",
        "Füße 日本語 😀",
        "line\nbreak",
        "tab\tand\x7f\x85\u2028",
        "%s $HOME `x`",
        "- dash",
    ],
)
def test_paths_arrive_as_they_are(name):
    write_pictures(name)
    write_table(f"{name}/captions.csv")
    propose(name, None, MINE)
    train = data_of().train
    assert (train.images, train.captions) == (here(name), here(f"{name}/captions.csv"))
    assert run_index()["captions"]["kept"] == len(NAMES)


def test_a_path_is_written_whole_and_from_the_home_folder(monkeypatch):
    write_pictures("home/a")
    monkeypatch.setenv("HOME", here("home"))
    propose("~/b/../a", None, MINE)
    assert data_of().train.images == here("home/a")


def test_a_zip_of_pictures_is_read_in_place():
    write_pictures()
    subprocess.run([sys.executable, "-m", "zipfile", "-c", "all.zip", "pictures"], check=True)
    write_table("captions.csv")
    propose("all.zip", "captions.csv", MINE)
    assert run_index()["captions"]["kept"] == len(NAMES)


def pack_tar(folder, captions):
    for shard, names in enumerate((NAMES[:6], NAMES[6:])):
        files = {name: png(Path(name).stem) for name in names}
        if captions:
            files |= {f"{Path(name).stem}.txt": name.encode() for name in names}
        write_tar(folder / f"{shard:05d}.tar", files)


def pack_parquet(folder, captions):
    images = [(None, png(color)) for color in COLORS]
    write_parquet(folder / "train-0.parquet", images, {"text": NAMES} if captions else None)


@pytest.mark.parametrize("captions", [True, False])
@pytest.mark.parametrize(("pack", "suffix"), [(pack_tar, "tar"), (pack_parquet, "parquet")])
@pytest.mark.parametrize("is_pattern", [True, False])
def test_shards_and_tables_bring_their_captions(pack, suffix, captions, is_pattern, capsys):
    folder = Path("packed [1]" if not is_pattern else "packed")
    folder.mkdir()
    pack(folder, captions)
    propose(f"{folder}/*.{suffix}" if is_pattern else str(folder), None, MINE)
    train = data_of().train
    assert train.images.endswith(f"/*.{suffix}")
    assert train.captions == (train.images if captions else None)
    report = run_index()
    assert report["images"]["kept"] == len(NAMES)
    assert report["captions"]["kept"] == (len(NAMES) if captions else 0)
    assert ("10 captions of 10 pictures" in capsys.readouterr().out) == captions


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (3, 3), (64, 8)])
def test_decoding_takes_the_cores_that_the_process_may_use(cores, workers, monkeypatch, capsys):
    write_pictures()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    propose("pictures", None, MINE)
    assert Params.read(MINE).values["extract"]["workers"] == workers
    assert f"as many decoding processes as CPU cores: {workers}" in capsys.readouterr().out


def test_a_file_of_its_own_is_written_again_and_no_other():
    write_pictures()
    propose("pictures", None, MINE)
    propose("pictures", None, MINE)
    text = MINE.read_bytes()[1:]
    for other in (text, b"\xff"):
        MINE.write_bytes(other)
        with pytest.raises(SettingsError, match=r"mine\.yaml: was not written by this command"):
            propose("pictures", None, MINE)
        assert MINE.read_bytes() == other


@pytest.mark.parametrize("kind", ["a pipe", "a link", "a link to nothing", "a folder"])
def test_what_is_no_ordinary_file_is_neither_read_nor_replaced(kind):
    write_pictures()
    propose("pictures", None, Path("written.yaml"))
    targets = {"a link": "written.yaml", "a link to nothing": "nothing"}
    if kind == "a pipe":
        os.mkfifo(MINE)
    elif kind == "a folder":
        MINE.mkdir()
    else:
        MINE.symlink_to(targets[kind])
    before = MINE.lstat()
    with pytest.raises(SettingsError, match=r"mine\.yaml: was not written by this command"):
        propose("pictures", None, MINE)
    assert MINE.lstat().st_ino == before.st_ino


@pytest.mark.parametrize(
    ("pictures", "captions", "error", "text"),
    [
        ("nowhere", None, StageError, "PICTURES: .*nowhere does not exist"),
        (
            "texts",
            None,
            SettingsError,
            "PICTURES: .*texts has .* files, none of them with the name",
        ),
        ("texts \udcff", None, SettingsError, r"PICTURES: '.*texts .udcff' is not UTF-8"),
        ("pictures", "nowhere.csv", StageError, "CAPTIONS: .*nowhere.csv does not exist"),
        ("pictures", "labels.csv", StageError, "CAPTIONS: .*labels.csv: no column 'caption'"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(pictures, captions, error, text):
    write_pictures()
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("x")
    write_table("labels.csv", header=("image", "label"))
    with pytest.raises(error, match=text):
        propose(pictures, captions, MINE)
    assert not MINE.exists()


@pytest.fixture
def weights(monkeypatch):
    """Sets what the download of the weights does, and why the hub cannot be reached."""

    def set_up(download, failure=""):
        monkeypatch.setattr(open_clip, "download_pretrained", download)
        monkeypatch.setattr("pipeline.towers.hub.hub_failure", lambda: failure)

    return set_up


def raises(error):
    def download(_):
        raise error

    return download


def test_the_weights_are_those_of_openai_where_they_can_be_had(weights):
    asked = []
    weights(asked.append)
    assert choose_weights() == "openai"
    assert asked == [open_clip.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")]
    assert asked[0]
    weights(asked.append, failure="no network, but a copy in the cache")
    assert choose_weights() == "openai"


@pytest.mark.parametrize(
    ("error", "failure", "reason"),
    [
        (OSError("not in the cache"), "no route", "the model hub cannot be reached (no route)"),
        (OSError("disk\nfull"), "", "disk full"),
        (RuntimeError("checksum"), "", "checksum"),
    ],
)
def test_random_weights_are_the_last_resort_and_loudly_said(
    weights, error, failure, reason, capsys
):
    weights(raises(error), failure)
    assert choose_weights() == "random"
    said = capsys.readouterr().out
    assert "RANDOM weights" in said
    assert reason in said


def test_the_tower_of_the_template_is_the_one_whose_weights_are_looked_for():
    assert Params.read(TEMPLATE).values["encoder"]["model"] == module.MODEL
