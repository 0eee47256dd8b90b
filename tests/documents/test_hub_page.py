"""The section about the Hub: one machine writes the card, another takes the store and trains on it.

A server on this machine plays the Hub. It cannot be written to: what the section's uploads would
send there is put into the folder that it serves.
"""

import csv
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from cache import FeatureStore
from tests.cache.remote.played_hub import TOKEN, PlayedHub, Repository
from tests.checkout import bytes_of, change_params, dvc, stages_run
from tests.documents.pages import ROOT, run_commands, section

pytestmark = pytest.mark.slow("trains on a store of a played Hub, under DVC")

UPLOAD, _, READ = section("The Hugging Face Hub")

REPOSITORY = "me/photo-features"


@pytest.fixture(scope="module")
def card(checkout) -> Path:
    """The card that the section's first command writes beside the store."""
    before = bytes_of(checkout / "data/features")
    run_commands(UPLOAD.runnable, checkout)
    assert bytes_of(checkout / "data/features") == before
    return checkout / "data/features.card.md"


@pytest.fixture(scope="module")
def uploaded(checkout, card, tmp_path_factory) -> Path:
    """The files that the uploads would put into the repository."""
    _, _, store, file = (shlex.split(command) for command in UPLOAD.commands)
    assert [words[2] for words in (store, file)] == [REPOSITORY, REPOSITORY]
    folder = tmp_path_factory.mktemp("hub") / "repository"
    shutil.copytree(checkout / store[3], folder)
    shutil.copy(checkout / file[3], folder / file[4])
    return folder


@pytest.fixture(scope="module", autouse=True)
def _hub(uploaded, tmp_path_factory) -> Iterator[None]:
    """Makes the played Hub that of every process which these tests start; the repository is
    private, and its reader is logged in."""
    hub = PlayedHub()
    hub.repositories[f"datasets/{REPOSITORY}"] = Repository(uploaded, is_private=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(tmp_path_factory.mktemp("home"), TOKEN).items():
            patch.setenv(name, value)
        yield
    hub.stop()


def test_the_card_names_the_repository_and_every_number_of_the_store(checkout, card):
    text, store = card.read_text(), FeatureStore(checkout / "data/features")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["pretty_name"].startswith("Patch features of my photographs (")
    for told in (store.fingerprint, f"| {len(store)} |", f"hf://datasets/{REPOSITORY}"):
        assert told in text


def test_writing_the_card_leaves_nothing_to_do_for_dvc(checkout, card):
    assert card.is_file()
    assert "Data and pipelines are up to date." in dvc(checkout, "status")
    tracked = run_commands(["git status --porcelain -- data"], checkout)
    assert tracked == [""]


def test_the_store_is_verified_and_downloaded_from_the_hub(checkout, uploaded, tmp_path):
    verified, _ = run_commands(
        [f"cd {checkout} && {READ.commands[0]}", f"cd {tmp_path} && {READ.commands[1]}"], tmp_path
    )
    assert "all bytes are those that were written" in verified
    downloaded = tmp_path / "my_features"
    names = {path.name for path in uploaded.iterdir()}
    assert names <= {path.name for path in downloaded.iterdir()}
    store, ours = FeatureStore(downloaded), FeatureStore(checkout / "data/features")
    assert store.verify().ok
    assert np.array_equal(store.gather(ours.image_ids), ours.gather(ours.image_ids))


def test_another_machine_trains_on_the_store_of_the_hub(checkout, world, tmp_path):
    text = " ".join((ROOT / "docs/sharing.md").read_text().split())
    settings = {"model": "external", "pretrained": f"hf://datasets/{REPOSITORY}"}
    assert all(f"`encoder.{key}: {value}`" in text for key, value in settings.items())
    other = tmp_path / "patchcache"
    shutil.copytree(checkout, other, symlinks=True, ignore=shutil.ignore_patterns(".work"))
    shutil.rmtree(other / "data/features")
    change_params(other, {"encoder": settings})
    # The features are the same bits, so that nothing behind them has to run again.
    assert stages_run(dvc(other, "repro", "--no-run-cache")) == ["code", "extract"]
    assert bytes_of(other / "data/features") == bytes_of(checkout / "data/features")
    trained = dvc(other, "repro", "--force", "--single-item", "pretrain")
    assert stages_run(trained) == ["pretrain"]
    assert losses(other) == losses(checkout)


def losses(clone: Path) -> list[tuple[str, str]]:
    with (clone / "runs/pretrain/history.csv").open() as file:
        return [(row["loss"], row["validation_loss"]) for row in csv.DictReader(file)]
