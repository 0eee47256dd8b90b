"""The table of docs/data.md that says what to write for which data: each row is indexed as written.

A row's small data is made at the paths of its snippet, in the layout that its first cell names.
"""

import csv
import io
import itertools
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from pipeline.images.source import open_images, read_source
from pipeline.index import index
from tests.documents.pages import ROOT
from tests.pipeline.images.range_server import RangeServer
from workspace.data_settings import DataSettings
from workspace.settings import Params

HEAD = "| what you have | what to write | what you get |"
KINDS = ("images", "captions", "conversations", "rejected")
REQUIRED = {"source": "local", "instruct_holdout": 0, "max_reject_rate": 0}
"""Keys that every settings file has, and that no row names."""


@dataclass
class Row:
    """A row of the table."""

    have: str
    snippet: str
    get: str

    @property
    def title(self) -> str:
        return re.match(r"\*\*(.*?)\*\*", self.have)[1]


def rows() -> list[Row]:
    text = (ROOT / "docs/data.md").read_text()
    lines = text[text.index(HEAD) :].splitlines()[2:]
    lines = itertools.takewhile(lambda line: line.startswith("|"), lines)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(have, "\n".join(re.findall(r"`(.*?)`", write)), get) for have, write, get in cells]


@dataclass
class Indexed:
    """What the index stage made."""

    tables: dict[str, list[dict[str, Any]]]
    report: dict[str, Any]
    source: Any
    """Reads the pictures of the index, as the stage extract does."""

    def column(self, table: str, name: str) -> list[Any]:
        return [row[name] for row in self.tables[table]]

    @property
    def names(self) -> list[str]:
        return sorted(self.column("images", "file_name"))

    @property
    def captions(self) -> set[tuple[str, str]]:
        """Captions with the names of their images."""
        names = {row["image_id"]: row["file_name"] for row in self.tables["images"]}
        return {(names[row["image_id"]], row["caption"]) for row in self.tables["captions"]}


def index_with(snippet: str) -> Indexed:
    lines = [f"{key}: {value}" for key, value in REQUIRED.items()] + snippet.splitlines()
    Path("params.yaml").write_text("seed: 0\ndata:\n" + "".join(f"  {line}\n" for line in lines))
    params = Params.read(Path("params.yaml"))
    index(params)
    tables = {kind: pq.read_table(f"data/index/{kind}.parquet").to_pylist() for kind in KINDS}
    source = open_images(read_source(), params.section("data", DataSettings))
    return Indexed(tables, json.loads(Path("reports/index.json").read_text()), source)


def picture(name: str) -> bytes:
    """A picture like no other."""
    data = io.BytesIO()
    Image.new("RGB", (8, 6), tuple(random.Random(name).randbytes(3))).save(data, "PNG")
    return data.getvalue() + name.encode()


def write(path: str, data: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data.encode() if isinstance(data, str) else data)


def write_folder(folder: str, names: list[str]) -> None:
    for name in names:
        write(f"{folder}/{name}", picture(f"{folder}/{name}"))


def write_zip(path: str, names: list[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, picture(f"{path}/{name}"))


def write_table(path: str, rows: list[dict[str, str]]) -> None:
    """Write rows as the suffix says."""
    if path.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.endswith(".jsonl"):
        write(path, "\n".join(map(json.dumps, rows)))
    else:
        text = io.StringIO()
        delimiter = "\t" if path.endswith(".tsv") else ","
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        write(path, text.getvalue())


def captions_of(names: list[str]) -> list[dict[str, str]]:
    return [{"image": name, "caption": f"a picture: {name}"} for name in names]


def pairs_of(names: list[str]) -> set[tuple[str, str]]:
    return {(name, f"a picture: {name}") for name in names}


def write_coco(path: str, names: list[str], *, first_id: int = 1) -> None:
    """Write captions in COCO's layout; ids are not those of the names."""
    ids = {name: first_id + number for number, name in enumerate(names)}
    value = {
        "images": [{"id": number, "file_name": name} for name, number in ids.items()],
        "annotations": [
            {"id": 10 * number, "image_id": number, "caption": f"a picture: {name}"}
            for name, number in ids.items()
        ],
    }
    write(path, json.dumps(value))


def conversation(name: str | None, question: str = "What is it?", answer: str = "x") -> dict:
    marker = "<image>\n" if name else ""
    turns = [{"from": "human", "value": marker + question}, {"from": "gpt", "value": answer}]
    return {"id": f"about {name}", "conversations": turns} | ({"image": name} if name else {})


def write_llava(path: str, records: list[dict]) -> None:
    lines = map(json.dumps, records)
    write(path, "\n".join(lines) if path.endswith(".jsonl") else f"[{','.join(lines)}]")


NAMES = [f"{letter}.png" for letter in "abcdefghijklmnopqrst"]
NUMBERS = [f"{number:012d}.jpg" for number in range(1, 21)]

Check = Callable[[Indexed], None]
CASES: dict[str, Callable[[], Check]] = {}
"""Title of a row to the function that makes its data, and returns a check of what came of it."""


def case(title: str) -> Callable[[Callable[[], Check]], Callable[[], Check]]:
    def register(make: Callable[[], Check]) -> Callable[[], Check]:
        CASES[title] = make
        return make

    return register


@case("COCO's layout")
def coco() -> Check:
    write_zip("coco/train2017.zip", [f"train2017/{name}" for name in NUMBERS[:8]])
    write_folder("coco/val2017", NUMBERS[8:12])
    write_coco("coco/captions_train2017.json", NUMBERS[:8], first_id=500)
    write_coco("coco/captions_val2017.json", NUMBERS[8:12], first_id=900)
    write_llava("coco/llava_instruct_150k.json", list(map(conversation, NUMBERS[:12])))

    def check(found: Indexed) -> None:
        assert found.column("images", "image_id") == [*range(500, 508), *range(900, 904)]
        assert found.captions == pairs_of(NUMBERS[:12])
        assert found.report["conversations"]["splits"] == {"holdout": 4, "train": 8}

    return check


@case("A folder and a table")
def table() -> Check:
    write_folder("pictures", NAMES)
    write_table("captions.csv", captions_of(NAMES))

    def check(found: Indexed) -> None:
        assert found.captions == pairs_of(NAMES)
        assert sorted(found.column("captions", "caption_id")) == list(range(20))
        named = [{"file_name": row["image"], "text": row["caption"]} for row in captions_of(NAMES)]
        for suffix in ("tsv", "jsonl", "parquet"):
            for entries in (captions_of(NAMES), named):
                write_table(f"other.{suffix}", entries)
                snippet = f"train: {{images: pictures, captions: other.{suffix}}}"
                assert index_with(snippet).tables == found.tables

    return check


@case("Questions in a table")
def questions() -> Check:
    write_folder("pictures", NAMES)
    entries = [{"image": n, "question": q, "answer": "yes"} for n in NAMES for q in ("a?", "b?")]
    write_table("questions.csv", entries)

    def check(found: Indexed) -> None:
        turns = [[turn["text"] for turn in row["turns"]] for row in found.tables["conversations"]]
        assert sorted(turns) == [["a?", "yes"]] * 20 + [["b?", "yes"]] * 20

    return check


@case("Pictures alone")
def pictures() -> Check:
    write_folder("pictures", NAMES)
    write("pictures/notes.pdf", "x")

    def check(found: Indexed) -> None:
        assert found.names == NAMES
        assert found.report["images"]["other_files"] == {"pdf": 1}

    return check


@case("Conversations alone")
def conversations() -> Check:
    write_folder("pictures", NAMES)
    write_llava("conversations.json", list(map(conversation, NAMES[:9])))

    def check(found: Indexed) -> None:
        assert found.names == NAMES[:9]

    return check


@case("Captions alone")
def captions() -> Check:
    for split, names in (("train", NUMBERS[:6]), ("val", NUMBERS[6:9])):
        write_zip(f"{split}.zip", names)
        write_coco(f"{split}.json", names, first_id=len(names))

    def check(found: Indexed) -> None:
        assert found.report["captions"]["splits"] == {"train": 6, "val": 3}

    return check


@case("No split val")
def no_val() -> Check:
    names = [f"{number}.png" for number in range(200)]
    write_folder("pictures", names)
    write_coco("captions.json", names)

    def check(found: Indexed) -> None:
        assert found.report["images"]["splits"]["val"] / 200 == pytest.approx(0.3, abs=0.1)
        assert found.report["captions"]["splits"] == found.report["images"]["splits"]

    return check


@case("LLaVA's JSON or JSONL")
def llava() -> Check:
    write_zip("train2017.zip", [f"train2017/{name}" for name in NUMBERS])
    write_coco("captions_train2017.json", NUMBERS)
    write_llava("llava_instruct_150k.json", list(map(conversation, NUMBERS[:15])))
    write_llava("more.jsonl", [conversation(name, "And?") for name in NUMBERS[5:]])

    def check(found: Indexed) -> None:
        assert len(found.tables["conversations"]) == 30
        splits = {row["image_id"]: row["split"] for row in found.tables["images"]}
        for row in found.tables["conversations"]:
            assert (row["split"] == "holdout") == (splits[row["image_id"]] == "val")

    return check


@case("LLaVA-Pretrain")
def llava_pretrain() -> Check:
    names = [f"{number // 10:05d}/{number:09d}.jpg" for number in range(4530, 4550)]
    write_zip("LLaVA-Pretrain/images.zip", names)
    records = [conversation(name, "Describe it.", f"a picture: {name}") for name in names]
    write_llava("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", records)

    def check(found: Indexed) -> None:
        assert found.captions == pairs_of(names)
        assert found.column("images", "image_id") == list(range(4530, 4550))

    return check


@case("LLaVA-1.5's mixture")
def mixture() -> Check:
    write_zip("train2017.zip", [f"train2017/{name}" for name in NUMBERS[:3]])
    write_zip("gqa/images.zip", ["images/1.jpg", "images/2.jpg"])
    write_folder("ocr_vqa/images", ["1.jpg", "140031996.gif"])
    write_zip("train_val_images.zip", ["train_images/f5.jpg"])
    write_zip("vg/images.zip", ["VG_100K/1.jpg", "VG_100K/3.jpg"])
    write_zip("vg/images2.zip", ["VG_100K_2/1.jpg"])
    named = [
        *(f"coco/train2017/{name}" for name in NUMBERS[:3]),
        "gqa/images/1.jpg",
        "gqa/images/2.jpg",
        "ocr_vqa/images/1.jpg",
        "ocr_vqa/images/140031996.gif",
        "textvqa/train_images/f5.jpg",
        "vg/VG_100K/1.jpg",
        "vg/VG_100K/3.jpg",
        "vg/VG_100K_2/1.jpg",
    ]
    write_llava("llava_v1_5_mix665k.json", list(map(conversation, [*named, None, None])))

    def check(found: Indexed) -> None:
        assert found.names == sorted(named)
        assert found.column("rejected", "reason") == ["text only"] * 2
        for row in found.tables["images"]:
            assert found.source.read(row["image_id"])

    return check


@case("Tar shards")
def shards() -> Check:
    Path("shards").mkdir()
    for shard, names in (("00000", NAMES[:10]), ("00001", NAMES[8:])):
        with tarfile.open(f"shards/{shard}.tar", "w") as archive:
            for name in names:
                stem = name.removesuffix(".png")
                text = f"a picture: {shard}/{name}"
                beside = ("txt", text) if stem < "f" else ("json", json.dumps({"caption": text}))
                for member, data in (
                    (name, picture(f"{shard}/{name}")),
                    (f"{stem}.{beside[0]}", beside[1].encode()),
                ):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))

    def check(found: Indexed) -> None:
        names = [f"00000/{name}" for name in NAMES[:10]] + [f"00001/{name}" for name in NAMES[8:]]
        assert found.captions == pairs_of(names)

    return check


@case("The Hub's parquet")
def hub() -> Check:
    Path("hub").mkdir()
    tables = {"train-00000-of-00002": NAMES[:8], "train-00001-of-00002": None}
    wanted = []
    for stem, names in tables.items():
        full_names = [f"{stem}/{name}" for name in names or range(8)]
        images = [
            {"bytes": picture(full), "path": names[row] if names else None}
            for row, full in enumerate(full_names)
        ]
        texts = [f"a picture: {full}" for full in full_names]
        pq.write_table(pa.table({"image": images, "text": texts}), f"hub/{stem}.parquet")
        wanted += full_names

    def check(found: Indexed) -> None:
        assert found.captions == pairs_of(wanted)
        assert "train-00001-of-00002/7" in found.names

    return check


@case("Several folders or zips")
def several() -> Check:
    names = ["1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]
    write_zip("summer.zip", names)
    write_folder("winter", names)
    for season in ("summer", "winter"):
        write_table(f"{season}.csv", captions_of([f"{season}/{name}" for name in names]))

    def check(found: Indexed) -> None:
        wanted = [f"{season}/{name}" for season in ("summer", "winter") for name in names]
        assert found.captions == pairs_of(wanted)
        for row in found.tables["images"]:
            season, name = row["file_name"].split("/")
            place = "summer.zip" if season == "summer" else "winter"
            assert found.source.read(row["image_id"]) == picture(f"{place}/{name}")

    return check


@case("URLs")
def urls() -> Check:
    write_zip("pictures.zip", NAMES)
    write_table("captions.csv", captions_of(NAMES))

    def check(found: Indexed) -> None:
        assert found.captions == pairs_of(NAMES)

    return check


@case("Karpathy's split")
def karpathy() -> Check:
    names = [f"COCO_{{}}2014_{number:012d}.jpg" for number in range(1, 9)]
    splits = ["train", "train", "restval", "restval", "val", "val", "test", "test"]
    images = []
    for number, (name, split) in enumerate(zip(names, splits, strict=True), start=1):
        folder = "train2014" if split == "train" else "val2014"
        file_name = name.format(folder.removesuffix("2014"))
        sentence = {"raw": f"a picture: {number}", "sentid": number}
        images.append(
            {"filepath": folder, "filename": file_name, "cocoid": number, "split": split}
            | {"sentences": [sentence], "imgid": number}
        )
    for folder in ("train2014", "val2014"):
        of_folder = [f"{folder}/{i['filename']}" for i in images if i["filepath"] == folder]
        write_zip(f"{folder}.zip", of_folder)
    write("dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}))
    question = {"question_id": 1, "image": "COCO_val2014_000000000003.jpg", "label": "yes"}
    write("coco_pope_random.json", json.dumps(question | {"text": "Is it?"}))

    def check(found: Indexed) -> None:
        assert found.column("images", "split") == [
            *("train", "train", "val", "train", "val", "val", "test", "test")
        ]

    return check


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(tmp_path):
    """The address of a web server that serves the folder of the test."""
    served = RangeServer(tmp_path)
    yield served.url
    served.stop()


def test_every_row_is_indexed_here_and_no_other():
    assert [row.title for row in rows()] == list(CASES)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.title)
def test_a_row_gives_what_it_says(row, server):
    check = CASES[row.title]()
    found = index_with(row.snippet.replace("https://example.org", server))
    check(found)

    assert {kind for kind in KINDS if found.tables[kind]} == set(
        re.findall(r"`(\w+)`", row.get)
    ) & set(KINDS)
    assert re.search(r"splits? ([\w, ]+);", row.get)[1].split(", ") == [
        split for split in ("train", "val", "test") if split in found.column("images", "split")
    ]
    stages = {"1": "captions", "2": "conversations"}
    trained = [stage for stage, kind in stages.items() if "train" in found.column(kind, "split")]
    said = re.match(r"stages? (\d)(?: and (\d))?|features", row.get)
    assert [number for number in said.groups() if number] == trained
    for image in found.tables["images"]:
        data = found.source.read(image["image_id"])
        assert xxhash.xxh3_64_intdigest(data) == image["source_xxh3"]
