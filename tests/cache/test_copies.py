"""Folders of copies go with their owner, and what a kill leaves goes with the next store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache.copies import LOCK, PREFIX, HashedFile, make_folder, remove_abandoned
from cache.errors import CorruptShardError
from cache.files import sha256_of

ROOT = Path(__file__).parents[2]

OPENS = """
import sys, time
from cache import FeatureStore
opened = FeatureStore(sys.argv[1])
opened.read_ahead([0])
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


class Owner:
    pass


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
    owner = Owner()
    folder = make_folder(owner)
    assert folder.stat().st_mode & 0o77 == 0
    (folder / "copy").write_bytes(b"x")
    del owner
    assert folders(temporary) == []


def test_what_a_kill_leaves_goes_with_the_next_and_a_living_process_keeps_its_own(
    temporary, start, store
):
    killed, living = start(OPENS), start(OPENS)
    assert {killed.stdout.readline(), living.stdout.readline()} == {"open\n"}
    assert len(folders(temporary)) == 2
    killed.kill()
    killed.wait()
    assert len(folders(temporary)) == 2
    owner = Owner()
    mine = make_folder(owner)
    left = [temporary / name for name in folders(temporary) if name != mine.name]
    assert len(left) == 1
    assert len(list(left[0].glob("*.h5"))) == 1
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
    owner = Owner()
    folder = make_folder(owner)
    child = os.fork()
    if not child:
        del owner
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir()
    # Nor did it unlock its parent's folder.
    remove_abandoned(temporary)
    assert folder.is_dir()


def test_what_is_not_ours_stays(temporary, tmp_path):
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
    first, second = Owner(), Owner()
    kept = make_folder(first)
    assert make_folder(second) != kept
    assert kept.is_dir()


@pytest.mark.parametrize("as_path", [False, True])
def test_a_file_is_hashed_however_it_is_written(tmp_path, as_path):
    target = HashedFile(tmp_path / "file", 100)
    if as_path:
        Path(target).write_bytes(b"ab" * 40)
    else:
        for _ in range(40):
            target.write(b"ab")
    assert target.finish() == (80, sha256_of(tmp_path / "file"))


def test_more_bytes_than_there_may_be_are_refused(tmp_path):
    with HashedFile(tmp_path / "file", 100) as target:
        target.write(b"x" * 100)
        with pytest.raises(CorruptShardError, match="more than 100 bytes came"):
            target.write(b"x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file():
    target = HashedFile(Path("/dev/full"), 1 << 30)
    with pytest.raises(OSError, match=r"No space left.*'/dev/full'"):
        target.write(b"x" * (1 << 20))
    target.close()
