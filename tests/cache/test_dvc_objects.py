"""Damaged objects in DVC's cache are deleted, so that the remote or the encoder replaces them."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache.dvc_objects import drop_damaged_objects

pytestmark = pytest.mark.slow("runs DVC")

SETTINGS = """[core]
    no_scm = true
    analytics = false
    remote = shared
[cache]
    type = "hardlink,copy"
    {cache}
['remote "shared"']
    url = ../../remote
"""


def dvc(folder, *arguments):
    subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True, capture_output=True
    )


def damage(path):
    """Change a byte of a write-protected file in place, and leave it protected."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    path.chmod(0o444)


@pytest.fixture
def repository(tmp_path, build_store):
    """A store that DVC tracks and has pushed; each shard is one file with its object."""

    def make(cache=""):
        folder = tmp_path / "repository"
        build_store(folder / "features")
        (folder / ".dvc").mkdir()
        (folder / ".dvc/config").write_text(SETTINGS.format(cache=cache))
        dvc(folder, "add", "features")
        dvc(folder, "push")
        return folder

    return make


def shards_of(folder) -> list[Path]:
    shards = sorted((folder / "features").glob("*.h5"))
    assert len(shards) > 2
    return shards


def object_of(shard, cache):
    """The file of the cache that is the same file as a shard."""
    return next(path for path in cache.glob("files/md5/*/*") if path.samefile(shard))


def test_a_pull_brings_the_damage_back_unless_the_object_is_dropped(repository):
    folder = repository()
    shard = shards_of(folder)[1]
    sound = shard.read_bytes()
    damage(shard)
    damaged = shard.read_bytes()
    assert damaged != sound

    shard.unlink()
    dvc(folder, "pull")
    assert shard.read_bytes() == damaged, "DVC now reads what it trusts: this module can go"

    shard.unlink()
    assert len(drop_damaged_objects(folder / "features", [shard.name])) == 1
    dvc(folder, "pull")
    assert shard.read_bytes() == sound


@pytest.mark.parametrize("cache", ["", "dir = ../../elsewhere"])
def test_only_damaged_objects_of_the_named_shards_are_dropped(repository, cache):
    folder = repository(cache)
    objects = folder.parent / "elsewhere" if cache else folder / ".dvc/cache"
    named, unnamed, sound = shards_of(folder)[:3]
    damage(named)
    damage(unnamed)
    wanted = object_of(named, objects)
    before = {path for path in objects.rglob("*") if path.is_file()}

    dropped = drop_damaged_objects(folder / "features", [named.name, sound.name])

    after = {path for path in objects.rglob("*") if path.is_file()}
    assert before - after == {wanted}
    assert [path.resolve() for path in dropped] == [wanted]


def test_a_damaged_listing_is_no_reason_to_stop(repository):
    folder = repository()
    shard = shards_of(folder)[0]
    damage(shard)
    listing = next((folder / ".dvc/cache").glob("files/md5/*/*.dir"))
    listing.chmod(0o644)
    listing.write_bytes(listing.read_bytes()[:-9])
    assert drop_damaged_objects(folder / "features", [shard.name]) == []


def test_a_listing_that_names_a_path_deletes_nothing(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    name = "0123456789abcdef.h5"
    listing = json.dumps([{"md5": f"ab{precious}", "relpath": name}]).encode()
    md5 = hashlib.md5(listing).hexdigest()
    objects = tmp_path / ".dvc/cache/files/md5"
    (objects / md5[:2]).mkdir(parents=True)
    (objects / md5[:2] / f"{md5[2:]}.dir").write_bytes(listing)
    assert drop_damaged_objects(tmp_path / "features", [name]) == []
    assert precious.exists()


def test_without_a_dvc_repository_there_is_nothing_to_drop(tmp_path):
    assert drop_damaged_objects(tmp_path, ["0123456789abcdef.h5"]) == []


def test_before_dvc_has_stored_anything_there_is_nothing_to_drop(tmp_path):
    (tmp_path / ".dvc").mkdir()
    assert drop_damaged_objects(tmp_path / "features", ["0123456789abcdef.h5"]) == []
