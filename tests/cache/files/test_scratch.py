"""Scratch folders are deleted with their owner, or after a kill by the next owner."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache.files.scratch import LOCK, PREFIX, ScratchFolder, remove_abandoned

ROOT = Path(__file__).parents[3]

OPENS = """
import sys, time
from cache import FeatureStore
opened = FeatureStore(sys.argv[1])
print("open", flush=True)
time.sleep(60)
"""

FORKS = """
import os, sys, time
from cache import FeatureStore
opened = FeatureStore(sys.argv[1])
if not os.fork():
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


@pytest.fixture
def start(store, temporary):
    started = []

    def begin(code):
        process = subprocess.Popen(
            [sys.executable, "-c", code, store.root.as_uri()],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def folders(temporary):
    return sorted(path.name for path in temporary.iterdir())


def test_a_folder_goes_with_its_owner(temporary):
    owner = ScratchFolder()
    folder = owner.path
    assert folder.stat().st_mode & 0o77 == 0
    (folder / "copy").write_bytes(b"x")
    del owner
    assert folders(temporary) == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_folder_goes_at_the_end_of_its_block_however_that_ends(temporary, error):
    with contextlib.suppress(KeyboardInterrupt), ScratchFolder() as folder:
        (folder / "uploads").mkdir()
        (folder / "uploads/1").write_bytes(b"data")
        if error:
            raise error
    assert folders(temporary) == []


def test_a_killed_owners_folder_is_deleted_by_the_next_and_a_living_owners_stays(
    temporary, start, store
):
    killed, living = start(OPENS), start(OPENS)
    assert {killed.stdout.readline(), living.stdout.readline()} == {"open\n"}
    assert len(folders(temporary)) == 2
    killed.kill()
    killed.wait()
    assert len(folders(temporary)) == 2
    owner = ScratchFolder()
    mine = owner.path
    left = [temporary / name for name in folders(temporary) if name != mine.name]
    assert len(left) == 1
    assert len(list(left[0].glob("*.parquet"))) == 1
    living.kill()
    living.wait()
    remove_abandoned(temporary)
    assert folders(temporary) == [mine.name]


def test_a_forked_child_keeps_the_folder_of_its_killed_parent(temporary, start):
    parent = start(FORKS)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        remove_abandoned(temporary)
        assert len(folders(temporary)) == 1
    finally:
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while folders(temporary) and time.monotonic() < deadline:
        remove_abandoned(temporary)
        time.sleep(0.01)
    assert folders(temporary) == []


def test_a_forked_child_removes_nothing_when_it_ends(temporary):
    owner = ScratchFolder()
    folder = owner.path
    child = os.fork()
    if not child:
        del owner
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    # Nor did it unlock its parent's folder.
    remove_abandoned(temporary)
    assert folder.is_dir()


def test_other_files_and_folders_stay(temporary, tmp_path):
    """A link, a file, a folder that nobody has marked, and other names."""
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / LOCK).touch()
    (temporary / f"{PREFIX}link").symlink_to(target)
    (temporary / f"{PREFIX}file").touch()
    (temporary / f"{PREFIX}unmarked").mkdir()
    (temporary / "other").mkdir()
    (temporary / "other" / LOCK).touch()
    before = folders(temporary)
    remove_abandoned(temporary)
    assert folders(temporary) == before
    assert (target / LOCK).exists()
    (temporary / f"{PREFIX}unmarked" / LOCK).touch()
    remove_abandoned(temporary)
    assert f"{PREFIX}unmarked" not in folders(temporary)


def test_a_folder_of_another_user_stays(temporary, monkeypatch):
    folder = temporary / f"{PREFIX}theirs"
    folder.mkdir()
    (folder / LOCK).touch()
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    remove_abandoned(temporary)
    assert folder.is_dir()


def test_without_locks_nothing_is_removed(temporary, monkeypatch):
    def refuse(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    first, second = ScratchFolder(), ScratchFolder()
    assert first.path != second.path
    assert first.path.is_dir()
