"""Two machines, two git clones, one DVC remote: the second trains without pictures or CLIP.

The first machine encodes, pushes, and later adds three pictures. The second has neither the world
nor the tower's weights, and `import open_clip` ends its processes.
"""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from cache import FeatureStore, IncompleteStoreError, MissingImageError
from demo.world import write_world
from tests.checkout import bytes_of, change_params, copy_project, dvc, run, stages_run

TRAINING = ["pretrain", "finetune", "evaluate"]

SHORT = {
    "pretrain": {"log_every_steps": 1, "validate_every_steps": 3, "samples": 0},
    "finetune": {"log_every_steps": 1, "validate_every_steps": 3, "samples": 0},
    "evaluate": {"caption_images": 6, "questions": 6, "caption_tokens": 6, "answer_tokens": 6},
}


class Machine(NamedTuple):
    """A checkout, and what lies beside it."""

    clone: Path

    @property
    def features(self) -> Path:
        return self.clone / "data/features"

    def git(self, *arguments: str) -> None:
        identity = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
        subprocess.run(["git", *identity, *arguments], cwd=self.clone, check=True)

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


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharing") / "remote"


@pytest.fixture(scope="module")
def first(remote) -> Machine:
    """The machine that has pictures: it encodes, pushes, and commits what DVC wrote."""
    machine = Machine(remote.parent / "first/patchcache")
    write_world(remote.parent / "first/world", num_train=60, num_val=12, seed=3)
    copy_project(machine.clone)
    change_params(machine.clone, SHORT)
    dvc(machine.clone, "remote", "add", "--default", "shared", str(remote))
    dvc(machine.clone, "repro", "extract")
    dvc(machine.clone, "push")
    machine.git("add", ".")
    machine.git("commit", "--quiet", "--message", "72 images")
    return machine


@pytest.fixture(scope="module")
def second(first) -> Machine:
    """The machine that has none: it clones, and pulls the features and the index."""
    machine = Machine(first.clone.parents[1] / "second/patchcache")
    machine.clone.parent.mkdir()
    Machine(machine.clone.parent).git("clone", "--quiet", str(first.clone), "patchcache")
    shutil.rmtree(machine.clone / "demo/checkpoints/clip")
    trap = "raise SystemExit('open_clip was imported')\n"
    (machine.clone / "open_clip.py").write_text(trap)
    dvc(machine.clone, "pull", "data/features", "data/index")
    return machine


class Trained(NamedTuple):
    """What `dvc repro` printed."""

    first: str
    second: str


@pytest.fixture(scope="module")
def trained(first, second) -> Trained:
    """Both machines train and evaluate, each by itself."""
    assert not (second.clone / "runs").exists()
    with ThreadPoolExecutor() as pool:
        one = pool.submit(dvc, first.clone, "repro")
        two = pool.submit(dvc, second.clone, "repro", "--allow-missing", "evaluate")
        return Trained(one.result(), two.result())


class Grown(NamedTuple):
    """The world before and after three more pictures."""

    shards_before: dict[str, bytes]
    remote_before: set[str]
    remote_after: set[str]
    cache_before: dict[str, int]


@pytest.fixture(scope="module")
def fetched(first, tmp_path_factory) -> Path:
    """A folder that got one shard of the first machine's repository, spec and index."""
    folder = tmp_path_factory.mktemp("fetched") / "features"
    folder.mkdir()
    shard = sorted(first.features.glob("*.h5"))[1]
    for name in ("spec.json", "index.parquet", shard.name):
        source = f"data/features/{name}"
        dvc(folder, "get", f"file://{first.clone}", source, "--out", name)
    return folder


@pytest.fixture(scope="module")
def grown(first, second, remote, trained) -> Grown:
    """The first machine adds pictures and pushes; the second pulls again."""
    dvc(first.clone, "push")
    shards_before = bytes_of(first.features)
    remote_before = {name for name, _ in objects_in(remote)}
    write_world(first.clone.parent / "world", num_train=60, num_val=15, seed=3)
    dvc(first.clone, "repro", "extract")
    dvc(first.clone, "push", "data/features", "data/index")
    first.git("commit", "--all", "--quiet", "--message", "75 images")

    cache_before = second.objects()
    second.git("restore", "dvc.lock")
    second.git("pull", "--quiet")
    dvc(second.clone, "pull", "data/features", "data/index")
    remote_after = {name for name, _ in objects_in(remote)}
    return Grown(shards_before, remote_before, remote_after, cache_before)


def test_the_second_machine_has_no_pictures_and_no_vision_tower(second):
    assert not (second.clone.parent / "world").exists()
    assert not (second.clone / "data/raw").exists()
    assert not (second.clone / "demo/checkpoints/clip").exists()
    assert "open_clip was imported" in run(second.clone, "pipeline.extract").stderr


def test_the_second_machine_trains_and_evaluates(second, trained):
    assert stages_run(trained.second) == TRAINING
    assert [stage for stage in stages_run(trained.first) if stage in TRAINING] == TRAINING


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_both_machines_see_the_same_losses(first, second, trained, stage):
    assert len(first.losses(stage)) > 2
    assert second.losses(stage) == first.losses(stage)
    for key in ("steps", "loss", "validation_loss", "texts"):
        assert second.report(f"{stage}.json")[key] == first.report(f"{stage}.json")[key]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_both_machines_train_the_same_weights(first, second, trained, stage):
    weights = f"runs/{stage}/projector.safetensors"
    assert (second.clone / weights).read_bytes() == (first.clone / weights).read_bytes()


def test_both_machines_score_the_same(first, second, trained):
    assert second.report("eval.json") == first.report("eval.json")


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
