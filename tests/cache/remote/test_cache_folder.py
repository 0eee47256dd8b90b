"""The folder of shards: its place, its limit, and what goes first."""

import os
import shutil
import threading

import numpy as np
import pytest

from cache import FeatureStore
from cache.errors import SettingsError
from cache.remote.cache_folder import (
    FOLDER_VARIABLE,
    FREE_SHARE,
    GIGABYTES_VARIABLE,
    KEPT_SHARE,
    OLD_SECONDS,
    CacheFolder,
)

LIMIT = 100_000


def sha(number):
    return f"{number:064x}"


@pytest.fixture
def folder(tmp_path):
    return CacheFolder.open(tmp_path / "shards", LIMIT)


def put(folder, number, num_bytes=20_000, age=0.0, path=CacheFolder.file):
    path(folder, sha(number)).write_bytes(b"x" * num_bytes)
    used = 1e9 - age
    os.utime(path(folder, sha(number)), (used, used))


def test_the_arguments_come_before_the_environment_and_that_before_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "of environment"))
    monkeypatch.setenv(GIGABYTES_VARIABLE, "0.5")
    assert CacheFolder.open(tmp_path / "own", 7) == CacheFolder(tmp_path / "own", 7)
    wanted = CacheFolder(tmp_path / "of environment", 500_000_000)
    assert CacheFolder.open(None, None) == wanted
    monkeypatch.delenv(FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert CacheFolder.open(None, None).path == tmp_path / "xdg/patchcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert CacheFolder.open(None, None).path == tmp_path / "home/.cache/patchcache"


def test_without_a_limit_half_of_the_free_disk_stays_free(tmp_path, monkeypatch):
    monkeypatch.delenv(GIGABYTES_VARIABLE, raising=False)
    space = os.statvfs(tmp_path)
    free = space.f_bavail * space.f_frsize
    limit = CacheFolder.open(tmp_path, None).limit
    assert abs(limit - FREE_SHARE * free) < 0.1 * free


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True])
def test_an_impossible_limit_is_refused(tmp_path, value):
    with pytest.raises(SettingsError, match="cache_bytes is"):
        CacheFolder.open(tmp_path, value)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "ten"])
def test_an_impossible_limit_of_the_environment_is_refused(tmp_path, monkeypatch, value):
    monkeypatch.setenv(GIGABYTES_VARIABLE, value)
    with pytest.raises(SettingsError, match=f"{GIGABYTES_VARIABLE} is '{value}'"):
        CacheFolder.open(tmp_path, None)


def test_a_file_in_its_place_is_refused(tmp_path, wide):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(SettingsError, match="is no folder"):
            FeatureStore(wide.root.as_uri(), cache_dir=path)


@pytest.mark.parametrize("path", ["/proc/nope", "x" * 300, "\0x"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(path):
    with pytest.raises(SettingsError, match=f"cannot be made .*{FOLDER_VARIABLE}") as caught:
        CacheFolder.open(path, LIMIT)
    assert str(caught.value).isprintable()


def test_a_folder_that_is_deleted_is_made_again(folder):
    shutil.rmtree(folder.path)
    assert folder.shrink(set()) == set()
    shutil.rmtree(folder.path)
    with folder.new_part(sha(1), 10):
        pass
    assert folder.part(sha(1)).exists()


def test_the_least_recently_used_go_first_until_there_is_room(folder):
    for number in range(6):
        put(folder, number, age=number)
    left = folder.shrink(set())
    assert left == {sha(number) for number in range(4)}
    assert KEPT_SHARE * LIMIT >= 4 * 20_480
    assert {path.name for path in folder.path.glob("*.h5")} == {f"{name}.h5" for name in left}


def test_below_the_limit_nothing_goes(folder):
    put(folder, 1)
    put(folder, 2, path=CacheFolder.part)
    assert folder.shrink(set()) == {sha(1), sha(2)}


def test_what_is_in_use_stays_even_beyond_the_limit(folder):
    for number in range(8):
        put(folder, number, age=number)
    left = folder.shrink({sha(7), sha(6)})
    assert {sha(7), sha(6), sha(0)} <= left
    assert sha(5) not in left


def test_a_sparse_part_counts_what_was_written(folder):
    for number in range(5):
        with folder.new_part(sha(number), 50_000):
            pass
    assert len(folder.shrink(set())) == 5


def test_a_part_goes_with_its_rows(folder):
    for number in range(8):
        put(folder, number, age=number, path=CacheFolder.part)
        folder.note_rows(sha(number), 3, b"\1\1")
        os.utime(folder.rows(sha(number)), (1.0, 1.0))
    left = folder.shrink(set())
    assert {path.stem for path in folder.path.glob("*.rows")} == left
    assert folder.arrived(sha(0), 6).tolist() == [False] * 3 + [True] * 2 + [False]
    assert not folder.arrived(sha(7), 6).any()


def test_files_that_a_killed_process_left_go_and_foreign_ones_stay(folder):
    left = folder.path / f".{sha(1)}.7.8"
    foreign = folder.path / "notes.txt"
    for path in (left, foreign):
        path.write_bytes(b"x")
        os.utime(path, (1.0, 1.0))
    young = folder.path / f".{sha(2)}.7.8"
    young.touch()
    for number in range(8):
        put(folder, number)
    folder.shrink(set())
    assert not left.exists()
    assert foreign.exists()
    assert young.exists()
    assert OLD_SECONDS > 60


def test_a_part_is_not_put_in_the_place_of_another(folder):
    with folder.new_part(sha(1), 10) as path:
        path.write_bytes(b"1" * 10)
    with folder.new_part(sha(1), 10) as path:
        path.write_bytes(b"2" * 10)
    assert folder.part(sha(1)).read_bytes() == b"1" * 10
    folder.complete(sha(1))
    assert folder.file(sha(1)).read_bytes() == b"1" * 10
    assert [path.name for path in folder.path.iterdir() if path.name != ".lock"] == [f"{sha(1)}.h5"]


def test_the_lock_excludes_threads(folder):
    entered = threading.Event()

    def enter():
        with folder.locked():
            entered.set()

    with folder.locked():
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(10)
    thread.join(10)


def test_nobody_else_deletes_during_a_turn(folder):
    other = CacheFolder.open(folder.path, LIMIT)
    for number in range(8):
        put(folder, number, age=number)
    with folder.turn():
        assert len(other.shrink(set())) == 8
        assert len(folder.shrink(set())) == 4
    put(folder, 9, 10**6)
    assert sha(9) not in other.shrink(set())


def test_it_is_measured_again_after_a_share_of_the_limit(folder):
    assert folder.wrote(1)
    folder.shrink(set())
    assert not folder.wrote(1)
    assert folder.wrote(LIMIT // 100)


def test_rows_that_nobody_noted_have_not_arrived(folder):
    assert np.array_equal(folder.arrived(sha(1), 3), [False] * 3)
