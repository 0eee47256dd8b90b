"""Two machines, two git clones, one DVC remote: the second trains without pictures or CLIP.

What they do are the blocks of the section "Sharing features". The first machine has encoded; it
pushes, and later adds three pictures. The second has neither the world nor the tower's weights,
and `import open_clip` ends its processes.
"""

import contextlib
import csv
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache import FeatureStore, IncompleteStoreError, MissingImageError
from demo.world import write_world
from tests.checkout import WORLD, bytes_of, dvc, run, stages_run
from tests.documents.pages import Block, run_commands, section

pytestmark = pytest.mark.slow("shares a store between repositories under DVC")

TRAINING = ["pretrain", "finetune", "control", "evaluate"]

PUSH, CLONE, PULL_RUNS, TRAIN, PULL_AGAIN, ONE_SHARD = section("Sharing features")


class Machine(NamedTuple):
    """A checkout, and what a reader of the section fills in."""

    clone: Path
    words: dict[str, str]

    def do(self, block: Block, folder: Path | None = None) -> list[str]:
        """Run a block and return what its commands printed."""
        return run_commands(block.commands, folder or self.clone, self.words)

    @property
    def features(self) -> Path:
        return self.clone / "data/features"

    def report(self, name: str) -> dict[str, object]:
        return json.loads((self.clone / "reports" / name).read_text())

    def losses(self, stage: str) -> list[tuple[str, str]]:
        with (self.clone / "runs" / stage / "history.csv").open() as file:
            return [(row["loss"], row["validation_loss"]) for row in csv.DictReader(file)]

    def objects(self) -> dict[str, int]:
        """Inodes of the files in this machine's DVC cache, by their md5."""
        return {name: path.stat().st_ino for name, path in objects_in(self.clone / ".dvc/cache")}


def objects_in(store: Path) -> list[tuple[str, Path]]:
    paths = (path for path in (store / "files/md5").glob("*/*") if path.is_file())
    return [(path.parent.name + path.name, path) for path in paths]


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def out_of_reach(world: Path) -> Iterator[None]:
    """Hide the pictures from a machine that is not to have them."""
    hidden = world.rename(world.with_name("hidden"))
    try:
        yield
    finally:
        hidden.rename(world)


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharing") / "remote"


@pytest.fixture(scope="module")
def first(checkout, remote) -> Machine:
    """The machine that has pictures: it has made everything, pushes, and commits."""
    machine = Machine(checkout, {"/mnt/team/patchcache": str(remote)})
    machine.do(PUSH)
    return machine


def clone_of(first: Machine, folder: Path) -> Machine:
    """Another machine: it clones, and pulls the features and the index."""
    machine = Machine(folder / "patchcache", {"<repository>": f"file://{first.clone}"})
    machine.do(CLONE, folder)
    return machine


@pytest.fixture(scope="module")
def second(first, tmp_path_factory) -> Machine:
    """A machine without pictures and without a vision tower."""
    machine = clone_of(first, tmp_path_factory.mktemp("second"))
    shutil.rmtree(machine.clone / "demo/checkpoints/clip")
    trap = "raise SystemExit('open_clip was imported')\n"
    (machine.clone / "open_clip.py").write_text(trap)
    return machine


@pytest.fixture(scope="module")
def third(first, tmp_path_factory) -> Machine:
    """A machine that takes over what the first one trained."""
    machine = clone_of(first, tmp_path_factory.mktemp("third"))
    machine.do(PULL_RUNS)
    return machine


class Trained(NamedTuple):
    """What the second machine printed and wrote when it trained with the same settings."""

    same: str
    other: str
    losses: dict[str, Sequence[tuple[str, str]]]
    reports: dict[str, dict[str, object]]
    weights: dict[str, bytes]


@pytest.fixture(scope="module")
def trained(second, world) -> Trained:
    """The second machine trains by itself, with the settings of the first and with others."""
    assert not (second.clone / "runs").exists()
    with out_of_reach(world):
        (same,) = run_commands(TRAIN.commands[:1], second.clone)
        losses = {stage: second.losses(stage) for stage in TRAINING[:2]}
        reports = {path.stem: second.report(path.name) for path in reports_of(second)}
        weights = {stage: projector(second, stage) for stage in TRAINING[:2]}
        (other,) = run_commands(TRAIN.commands[1:], second.clone)
    return Trained(same, other, losses, reports, weights)


def reports_of(machine: Machine) -> list[Path]:
    return sorted((machine.clone / "reports").glob("*.json"))


def projector(machine: Machine, stage: str) -> bytes:
    return (machine.clone / "runs" / stage / "projector.safetensors").read_bytes()


class Grown(NamedTuple):
    """The world before and after three more pictures."""

    shards_before: dict[str, bytes]
    remote_before: set[str]
    remote_after: set[str]
    cache_before: dict[str, int]


@pytest.fixture(scope="module")
def fetched(first, tmp_path_factory) -> Path:
    """A folder that got one shard of the first machine's repository, spec and index."""
    folder = tmp_path_factory.mktemp("fetched")
    key = sorted(first.features.glob("*.h5"))[1].stem
    words = {"<repository>": f"file://{first.clone}", "<key>": key}
    run_commands(ONE_SHARD.commands, folder, words)
    return folder / "part"


@pytest.fixture(scope="module")
def grown(first, second, remote, trained, fetched, world) -> Iterator[Grown]:
    """The first machine adds pictures and pushes; the second pulls again."""
    shards_before = bytes_of(first.features)
    remote_before = {name for name, _ in objects_in(remote)}
    write_world(world, **WORLD | {"num_val": WORLD["num_val"] + 3})
    dvc(first.clone, "repro", "extract")
    dvc(first.clone, "push", "data/features", "data/index")
    run_commands(["git commit --all --quiet --message 'more images'"], first.clone)

    cache_before = second.objects()
    second.do(PULL_AGAIN)
    remote_after = {name for name, _ in objects_in(remote)}
    yield Grown(shards_before, remote_before, remote_after, cache_before)
    write_world(world, **WORLD)


def test_the_second_machine_has_no_pictures_and_no_vision_tower(second):
    assert not (second.clone / "data/raw").exists()
    assert not (second.clone / "demo/checkpoints/clip").exists()
    assert "open_clip was imported" in run(second.clone, "pipeline.extract").stderr


def test_the_second_machine_trains_and_evaluates(trained):
    assert stages_run(trained.same) == TRAINING


def test_the_second_machine_trains_with_settings_of_its_own(first, second, trained):
    # The tower is gone from `demo`, on which the stage `code` depends.
    assert stages_run(trained.other) == ["code", *TRAINING]
    assert second.losses("pretrain") != first.losses("pretrain")


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_both_machines_see_the_same_losses(first, trained, stage):
    assert len(first.losses(stage)) > 2
    assert trained.losses[stage] == first.losses(stage)
    for key in ("steps", "loss", "validation_loss", "texts"):
        assert trained.reports[stage][key] == first.report(f"{stage}.json")[key]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_both_machines_train_the_same_weights(first, trained, stage):
    assert trained.weights[stage] == projector(first, stage)


def test_both_machines_score_the_same(first, trained):
    assert trained.reports["eval"] == first.report("eval.json")


def test_runs_and_report_can_be_pulled_instead(first, third):
    for stage in TRAINING[:2]:
        assert projector(third, stage) == projector(first, stage)
    names = {path.name for path in (first.clone / "reports").iterdir()}
    # Those of the stages that make the features stay with the pictures.
    wanted = names - {"index.json", "extract.json", ".gitignore"}
    assert wanted == {path.name for path in (third.clone / "reports").iterdir()} - {".gitignore"}


def test_a_shard_that_was_fetched_alone_is_a_partial_store(first, fetched):
    shards = [path.name for path in sorted(first.features.glob("*.h5"))]
    (name,) = (path.name for path in fetched.glob("*.h5"))
    store, whole = FeatureStore(fetched, partial=True), FeatureStore(first.features)
    assert store.image_ids.tolist() == images_in(first.features, name)
    assert store.missing_shards == tuple(shard for shard in shards if shard != name)
    assert np.array_equal(store.gather(store.image_ids), whole.gather(store.image_ids))


def test_what_a_partial_store_lacks_is_named(first, fetched):
    store = FeatureStore(fetched, partial=True)
    lacking = store.missing_shards[0]
    with pytest.raises(MissingImageError, match=re.escape(lacking)):
        store.gather(images_in(first.features, lacking)[:1])


def test_a_shard_that_was_fetched_alone_is_no_whole_store(fetched):
    with pytest.raises(IncompleteStoreError):
        FeatureStore(fetched)


def images_in(features: Path, shard: str) -> list[int]:
    """The image ids of a shard, as the index has them."""
    table = pq.read_table(features / "index.parquet", filters=[("shard", "=", shard)])
    return table["image_id"].to_pylist()


def test_pushing_after_new_pictures_sends_new_shards_and_tables_only(first, grown):
    shards = {path.name for path in first.features.glob("*.h5")}
    new_shards = shards - grown.shards_before.keys()
    assert 0 < len(new_shards) < len(shards) / 3
    sent = grown.remote_after - grown.remote_before
    folders = {name for name in sent if name.endswith(".dir")}
    tables = [first.features / "index.parquet", *(first.clone / "data/index").iterdir()]
    wanted = {md5_of(first.features / name) for name in new_shards}
    wanted |= {md5_of(path) for path in tables} - grown.remote_before
    assert sent - folders == wanted
    assert len(folders) == 2


def test_pulling_again_gives_the_first_machines_store(first, second, grown):
    assert len(FeatureStore(second.features)) == 75
    assert bytes_of(second.features) == bytes_of(first.features)


def test_pulling_again_downloads_nothing_that_was_there(second, grown):
    now = second.objects()
    assert {name: now[name] for name in grown.cache_before} == grown.cache_before
    came = now.keys() - grown.cache_before.keys()
    assert came == grown.remote_after - grown.remote_before


def test_a_repaired_shard_is_made_again_though_dvc_has_the_damage_too(first, grown):
    sound = bytes_of(first.features)
    shard = sorted(first.features.glob("*.h5"))[0]
    flip_a_byte(shard)
    assert md5_of(shard) not in first.objects()
    repaired = run(first.clone, "cache.verify", "data/features", "--repair")
    assert (repaired.returncode, shard.exists()) == (1, False)
    assert stages_run(dvc(first.clone, "repro", "extract")) == ["extract"]
    assert bytes_of(first.features) == sound


def flip_a_byte(path: Path) -> None:
    """Damage a write-protected file in place, as a disk would."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)
