"""The page's example of a store of features that no ViT made: written, trained on and scored."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cache import FeatureStore
from tests.checkout import bytes_of, change_params, dvc, run, stages_run
from tests.documents.pages import all_blocks, run_python
from tests.documents.test_pages import OWN_FEATURES

pytestmark = pytest.mark.slow("runs the whole pipeline under DVC on features of a CNN")

STAGES = ["code", "extract", "pretrain", "finetune", "control", "evaluate"]
SETTINGS = {
    "encoder": {"model": "external", "pretrained": "my_features"},
}


@pytest.fixture(scope="module")
def pictures(checkout, world) -> Path:
    """All pictures of the small world in one folder, as a reader may have them."""
    folder = checkout.parent / "pictures"
    folder.mkdir()
    for name in ("train2017", "val2017"):
        with zipfile.ZipFile(world / f"{name}.zip") as archive:
            for member in archive.namelist():
                (folder / Path(member).name).write_bytes(archive.read(member))
    return folder


def write(checkout: Path, pictures: Path, **words: str) -> None:
    (block,) = (block for block in all_blocks("python") if block.heading == OWN_FEATURES)
    run_python(block.text, checkout, {"/data/mine/pictures": str(pictures)} | words)


@pytest.fixture(scope="module")
def written(checkout, pictures) -> Path:
    write(checkout, pictures)
    return checkout / "my_features"


@pytest.fixture(scope="module")
def stdout(checkout, written) -> str:
    """What `dvc repro` prints with the settings that the page names."""
    text = " ".join((Path(__file__).parents[2] / "docs/data.md").read_text().split())
    for section, values in SETTINGS.items():
        for key, value in values.items():
            assert f"`{section}.{key}: {value}`" in text
    change_params(checkout, SETTINGS)
    return dvc(checkout, "repro")


def test_the_store_holds_the_map_of_every_picture(written):
    store = FeatureStore(written)
    assert store.verify().ok
    assert len(store) == 72
    first, second = store.gather(store.image_ids[:2]).astype(np.float64)
    assert 0.01 < first.std() < 10
    assert not np.array_equal(first, second)


def test_the_stages_behind_the_features_run_and_no_others(checkout, stdout):
    assert stages_run(stdout) == STAGES
    assert stages_run(dvc(checkout, "repro")) == []


def test_the_features_are_the_store(checkout, written, stdout):
    assert bytes_of(checkout / "data/features") == bytes_of(written)
    report = json.loads((checkout / "reports/extract.json").read_text())
    assert (report["images"], report["failed"], report["shards_encoded"]) == (72, 0, 0)


def test_report_and_scores_are_made(checkout, stdout):
    scores = json.loads((checkout / "reports/eval.json").read_text())
    assert scores["captions"]["count"] > 0
    assert "blind" in scores["captions"]
    assert "features of the store my_features." in (checkout / "reports/index.html").read_text()


def test_a_cached_image_can_be_asked_about(checkout, stdout):
    done = run(checkout, "eval.ask", "--run", "runs/finetune", "--image-id", "61", "where?")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("eval.ask", ["--image", "PICTURE", "where?"]),
        ("eval.serve", ["--port", "7869"]),
        ("eval.export", ["OUT"]),
    ],
)
def test_what_needs_a_tower_is_refused_in_one_line(checkout, pictures, stdout, command, arguments):
    words = {"PICTURE": str(next(pictures.iterdir())), "OUT": str(checkout.parent / "exported")}
    filled = [words.get(argument, argument) for argument in arguments]
    done = run(checkout, command, "--run", "runs/finetune", *filled)
    assert done.returncode == 2
    error = "error: encoder.model is external: the features are those of my_features, and no vision"
    assert done.stderr.splitlines()[-1].startswith(error)
    assert "Traceback" not in done.stderr
    assert not (checkout.parent / "exported").exists()


def test_a_changed_store_is_taken_again(checkout, pictures, written, stdout):
    shutil.rmtree(written)
    write(checkout, pictures, **{"four-convolutions": "4-convolutions"})
    assert stages_run(dvc(checkout, "repro", "--single-item", "--force", "extract")) == ["extract"]
    assert FeatureStore(checkout / "data/features").spec.model == "4-convolutions"
