"""The folder of a server: private, removed at the end, and by the next server after a kill."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from eval.server_folder import PREFIX, server_folder

ROOT = Path(__file__).parents[2]
HOLD = """
from eval.server_folder import server_folder
with server_folder() as folder:
    (folder / "upload").write_bytes(b"data")
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def _temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def other_server(tmp_path):
    """A process that has a folder, and the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()


def test_the_folder_is_private_and_removed_at_the_end(tmp_path):
    with server_folder() as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o77 == 0
        (folder / "uploads").mkdir()
        (folder / "uploads/1").write_bytes(b"data")
    assert list(tmp_path.iterdir()) == []


def test_it_is_removed_after_an_interrupt_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), server_folder():
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_server_is_removed_and_no_other(tmp_path, other_server):
    process, theirs = other_server
    (tmp_path / "unrelated").mkdir()
    with server_folder() as folder:
        assert {path.name for path in tmp_path.iterdir()} == {
            folder.name, theirs.name, "unrelated",
        }  # fmt: skip
    assert (theirs / "upload").read_bytes() == b"data", "that server lives"
    process.kill()
    process.wait()
    with server_folder() as folder:
        assert {path.name for path in tmp_path.iterdir()} == {folder.name, "unrelated"}


def test_a_link_with_such_a_name_is_not_followed(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_bytes(b"data")
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").write_bytes(b"data")
    with server_folder():
        pass
    assert (target / "file").exists()
    assert (tmp_path / f"{PREFIX}file").exists()
