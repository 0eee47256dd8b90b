"""The data of full size, small: what is made, what index takes of it, and the limit of memory."""

import json
import shutil
import zipfile

import pytest

from bench import full_coco, full_store, pages
from bench.child import call_measured, run_measured
from bench.coco_sized import COCO, write_inputs
from bench.memory_group import memory_group
from pipeline.images.decode import decode_upright

pytestmark = pytest.mark.slow("starts stages on a thousandth of COCO")

SIZE = COCO.divided_by(1000)
PICTURES = 7
MEGABYTE = 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    write_inputs(folder, SIZE, PICTURES)
    return folder


def test_the_full_size_is_that_of_the_published_data():
    assert COCO.images == {"train": 118_287, "val": 5_000}
    assert sum(COCO.captions.values()) == 616_767
    assert sum(COCO.conversations.values()) == 157_712


def test_files_have_as_many_records_as_were_asked_for(folder):
    for split, count in SIZE.captions.items():
        captions = json.loads((folder / f"raw/captions_{split}.json").read_text())
        assert len(captions["annotations"]) == count
        assert len({image["id"] for image in captions["images"]}) == SIZE.images[split]
    conversations = json.loads((folder / "raw/instruct.json").read_text())
    assert len(conversations) == sum(SIZE.conversations.values())


def test_pictures_are_a_few_that_can_be_decoded_and_no_two_files_are_alike(folder):
    with zipfile.ZipFile(folder / "raw/train.zip") as archive:
        files = [archive.read(name) for name in archive.namelist()]
    assert len(set(files)) == len(files) == SIZE.images["train"]
    assert len({decode_upright(data).tobytes() for data in files}) == PICTURES


def test_index_must_use_every_record(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    assert full_coco.measure_index(tmp_path, SIZE)["seconds"] > 0
    with pytest.raises(RuntimeError, match="index kept"):
        full_coco.measure_index(tmp_path, COCO.divided_by(900))


@pytest.fixture
def group():
    try:
        with memory_group(64 * MEGABYTE) as group:
            yield group
    except OSError as error:
        pytest.skip(f"memory cannot be limited here: {error}")


def test_a_process_that_needs_more_than_its_group_may_take_is_killed(group, tmp_path):
    allocate = ["-c", "import sys; bytearray(int(sys.argv[1]) * 10**6)"]
    assert run_measured([*allocate, "20"], tmp_path, group=group).exit_code == 0
    child = run_measured([*allocate, "200"], tmp_path, group=group)
    with pytest.raises(RuntimeError, match="allocate: exit code -9"):
        child.check("allocate")


def test_the_page_cache_counts_and_the_group_stays_within_its_limit(group, tmp_path):
    (tmp_path / "large").write_bytes(bytes(200 * MEGABYTE))
    pages.sync(tmp_path)
    pages.drop(tmp_path)
    read = "file = open('large', 'rb')\nwhile file.read(2**20): pass"
    run_measured(["-c", read], tmp_path, group=group).check("read")
    assert 40 * MEGABYTE < group.peak() <= 64 * MEGABYTE


def test_a_call_returns_figures_and_memory_of_its_own_process(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    run_measured(["-m", "pipeline.index"], tmp_path).check("index")
    found = call_measured(full_store.plan, folder=tmp_path)
    assert found["shards"] >= 1
    assert found.keys() == {"seconds", "shards", "peak_gib", "peak_anonymous_gib"}
