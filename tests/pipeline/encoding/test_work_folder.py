"""A file counts as finished when its bytes are those whose hash was written, and never else."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from cache.files.atomic import sha256_of, sha256_of_pieces
from cache.plan import plan_shards
from cache.publish import publish
from cache.shard import shard_bytes
from cache.spec import FORMAT, Spec
from cache.store_index import INDEX_FILE, PROBE_FILE
from pipeline.encoding import work_folder as module
from pipeline.encoding.work_folder import (
    PULLED,
    delete_unfinished,
    hash_path,
    probe_path,
    recover_shards,
    verified_hash,
    verified_hashes,
    write_with_hash,
)
from workspace.paths import SHARDS

SPEC = Spec(
    format=FORMAT, model="tiny", weights_sha256="ab" * 32, activation="gelu", layer=-2,
    tokens="patch", normalized=False, image_size=32, resize="shortest", crop="center",
    interpolation="bicubic", mean=(0.5,) * 3, std=(1.0,) * 3, precision="fp32", batch_size=4,
    dtype="float16", patches=4, width=6, preprocess_version=1,
)  # fmt: skip

OTHER = Spec(**(vars(SPEC) | {"layer": -1}))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SHARDS.mkdir(parents=True)
    return tmp_path


def finish_bytes(path, data=b"content"):
    digest = hashlib.sha256(data).hexdigest()
    write_with_hash(path, [data[:3], memoryview(data)[3:]], digest)
    return digest


def files(folder=SHARDS):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


# Finishing


def test_a_finished_file_has_its_hash():
    path = SHARDS / "x.h5"
    digest = finish_bytes(path)
    assert files() == {"x.h5": b"content", "x.sha256": digest.encode()}
    assert digest == sha256_of(path) == verified_hash(path)


def test_a_file_that_holds_other_bytes_than_were_meant_is_never_finished(capsys):
    """Whoever wrote them: the hash is not taken of what lies there."""
    path = SHARDS / "x.h5"
    write_with_hash(path, [bytes(7)], hashlib.sha256(b"content").hexdigest())
    assert verified_hash(path) is None
    assert "again" in capsys.readouterr().out


def test_what_killed_writers_left_goes_and_finished_files_stay():
    write_with_hash(SHARDS / "a.h5", [b"a"], sha256_of_pieces([b"a"]))
    before = sorted(SHARDS.iterdir())
    (SHARDS / ".b.h5.partial").write_bytes(b"b")
    delete_unfinished(SHARDS)
    assert sorted(SHARDS.iterdir()) == before


def test_a_partial_file_is_not_finished():
    (SHARDS / ".x.h5.partial").write_bytes(b"content")
    assert verified_hash(SHARDS / "x.h5") is None


@pytest.mark.parametrize("before", [None, b"damaged", b"older"])
def test_a_kill_between_the_hash_and_the_rename_leaves_nothing_finished(
    before, monkeypatch, capsys
):
    path = SHARDS / "x.h5"
    if before:
        finish_bytes(path, before)
    if before == b"damaged":
        path.write_bytes(b"other")
    real, renamed = os.replace, []

    def replace(source, target):
        if Path(target) == path:
            renamed.append(dict(files()))
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            finish_bytes(path)
    # The hash was there first.
    assert renamed[0]["x.sha256"].decode() == hashlib.sha256(b"content").hexdigest()
    assert renamed[0][".x.h5.partial"] == b"content"
    capsys.readouterr()
    assert verified_hash(path) is None
    assert bool(capsys.readouterr().out) == (before is not None)
    finish_bytes(path)
    assert verified_hash(path)


def test_a_file_without_its_hash_is_not_finished():
    path = SHARDS / "x.h5"
    finish_bytes(path)
    hash_path(path).unlink()
    assert verified_hash(path) is None


@pytest.mark.parametrize("data", [b"", b"conten", b"content ", b"Content"])
def test_a_damaged_file_is_printed_and_not_counted(data, capsys):
    path = SHARDS / "x.h5"
    finish_bytes(path)
    path.write_bytes(data)
    assert verified_hash(path) is None
    out = capsys.readouterr().out
    assert out == f"extract: making {path} again: its bytes are not those that were written\n"


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 64, b"0" * 64, b"0"], ids=["empty", "no text", "another", "short"]
)
def test_a_damaged_hash_is_printed_and_not_counted(data, capsys):
    path = SHARDS / "x.h5"
    finish_bytes(path)
    hash_path(path).write_bytes(data)
    assert verified_hash(path) is None
    assert "again" in capsys.readouterr().out


# Shards of a plan


def content(planned, spec):
    """Features that say which image, and which encoder, they are of."""
    rows = np.arange(spec.patches * spec.width) + planned.image_ids[:, None] + spec.layer
    return rows.reshape(-1, spec.patches, spec.width).astype(np.float16)


def plan_of(spec, num_images=12):
    image_ids = np.arange(1, num_images + 1)
    return plan_shards(image_ids, image_ids.astype(np.uint64), spec.fingerprint, 3)


def make_all(spec, plan):
    for planned in plan:
        pieces = shard_bytes(spec, planned.image_ids, content(planned, spec))
        write_with_hash(SHARDS / planned.name, pieces, sha256_of_pieces(pieces))
    finish_bytes(probe_path(spec), b"probe of layer %d" % spec.layer)


def test_only_planned_shards_that_are_whole_are_counted(capsys):
    plan = plan_of(SPEC)
    assert len(plan) >= 4
    make_all(SPEC, plan)
    (SHARDS / plan[0].name).unlink()
    (SHARDS / plan[1].name).write_bytes(b"x")
    found = verified_hashes(plan[:-1])
    assert found == {shard.name: sha256_of(SHARDS / shard.name) for shard in plan[2:-1]}
    assert capsys.readouterr().out.count("again") == 1
    assert verified_hashes([]) == {}


# Shards that DVC has


class Stored:
    """What DVC has, in place of its repository; `recover` with the same promise."""

    def __init__(self, spec):
        self.plan = plan_of(spec)
        make_all(spec, self.plan)
        hashes = verified_hashes(self.plan)
        publish(Path("stored"), self.plan, SHARDS, spec, hashes, probe_path(spec))
        self.names = {shard.name for shard in self.plan}
        self.files = files(Path("stored"))
        for path in SHARDS.iterdir():
            path.unlink()
        self.fetched = []

    def recover(self, names, folder):
        chosen = sorted(n for n in names & self.files.keys() if not (folder / n).exists())
        for name in chosen:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(self.files[name])
        self.fetched += chosen
        return chosen


@pytest.fixture
def stored(monkeypatch):
    made = Stored(SPEC)
    monkeypatch.setattr(module, "recover", made.recover)
    return made


def finished_names():
    """Names of the files that count as finished."""
    paths = [path for path in SHARDS.iterdir() if path.suffix in (".h5", ".safetensors")]
    return {path.name for path in paths if verified_hash(path)}


def test_shards_and_the_probe_come_back_as_they_were_published(stored):
    wanted = {shard.name for shard in stored.plan[1:3]}
    recover_shards(wanted, SPEC)
    probe = probe_path(SPEC)
    assert finished_names() == wanted | {probe.name}
    assert all((SHARDS / name).read_bytes() == stored.files[name] for name in wanted)
    assert probe.read_bytes() == stored.files[PROBE_FILE]
    assert not PULLED.exists()


def test_a_shard_is_accepted_only_with_the_hash_of_the_index(stored):
    damaged, swapped, other, good = sorted(stored.names)[:4]
    stored.files[damaged] = stored.files[damaged][:-1] + b"x"
    stored.files[swapped] = stored.files[other]
    stored.files[PROBE_FILE] += b"x"
    foreign = "0123456789abcdef.h5"
    stored.files[foreign] = b"not in the index"
    recover_shards({damaged, swapped, good, foreign}, SPEC)
    assert finished_names() == {good}
    assert set(files()) == {good, hash_path(SHARDS / good).name}
    assert not PULLED.exists()


@pytest.mark.parametrize("spec", [SPEC, OTHER], ids=["no index", "another encoder"])
def test_without_an_index_of_this_encoder_nothing_is_taken(stored, spec):
    if spec == SPEC:
        del stored.files[INDEX_FILE]
    recover_shards(stored.names, spec)
    assert files() == {}
    assert not PULLED.exists()


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-9], lambda data: b"x"])
def test_with_a_damaged_index_nothing_is_taken(stored, damage):
    stored.files[INDEX_FILE] = damage(stored.files[INDEX_FILE])
    recover_shards(stored.names, SPEC)
    assert files() == {}
    assert not PULLED.exists()


def test_a_store_without_a_probe_gives_its_shards(stored):
    del stored.files[PROBE_FILE]
    recover_shards(stored.names, SPEC)
    assert finished_names() == stored.names


def test_where_dvc_has_nothing_nothing_is_left_behind(monkeypatch):
    monkeypatch.setattr(module, "recover", lambda names, folder: [])
    recover_shards({"0123456789abcdef.h5"}, SPEC)
    assert files() == {}
    assert not PULLED.exists()


def test_a_recovery_that_was_killed_goes_on_where_it_was(stored, monkeypatch):
    """What it had pulled is not pulled again, but for the index, which may be another one now."""
    first, second = sorted(stored.names)[:2]

    def killed(names, folder):
        stored.recover({first, INDEX_FILE, PROBE_FILE}, folder)
        (folder / f".{second}.partial").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "recover", killed)
    with pytest.raises(KeyboardInterrupt):
        recover_shards({first, second}, SPEC)
    (PULLED / INDEX_FILE).write_bytes(b"of another store")
    (PULLED / PROBE_FILE).write_bytes(b"of another store")
    monkeypatch.setattr(module, "recover", stored.recover)
    recover_shards({first, second}, SPEC)
    assert finished_names() == {first, second, probe_path(SPEC).name}
    assert stored.fetched.count(first) == 1
    assert not PULLED.exists()


@pytest.mark.parametrize("is_same", [True, False])
def test_a_probe_that_is_here_must_be_that_of_the_store_that_dvc_has(stored, is_same):
    probe = probe_path(SPEC)
    data = stored.files[PROBE_FILE] if is_same else b"of other libraries"
    finish_bytes(probe, data)
    recover_shards(stored.names, SPEC)
    assert finished_names() == (stored.names if is_same else set()) | {probe.name}
    assert probe.read_bytes() == data
