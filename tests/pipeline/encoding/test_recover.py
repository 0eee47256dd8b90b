"""Shards that DVC has stored come back, within a running stage too; what it lacks is one line."""

import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.encoding.recover import recover

ROOT = Path(__file__).parents[3]

SETTINGS = """[core]
    no_scm = true
    analytics = false
    remote = shared
['remote "shared"']
    url = ../../remote
"""

STAGE = """
stages:
  extract:
    cmd: python stage.py
    deps: [stage.py, wish]
    outs: [data/features]
"""

# Recovers what it can, says so, and makes what is missing.
CODE = """
from pathlib import Path
from pipeline.encoding.recover import recover

features, work = Path("data/features"), Path("work")
names = Path("wish").read_text().split()
print("recovered", *recover(names, work))
features.mkdir(parents=True)
work.mkdir(exist_ok=True)
for name in names:
    if not (work / name).exists():
        (work / name).write_text("made of " + name)
    (features / name).write_bytes((work / name).read_bytes())
"""


def dvc(folder, *arguments):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_repository(folder):
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text(SETTINGS)
    (folder / "dvc.yaml").write_text(STAGE)
    (folder / "stage.py").write_text(CODE)
    (folder / "wish").write_text("a.h5 b.h5")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A DVC repository whose stage ran and whose outputs were pushed."""
    folder = tmp_path_factory.mktemp("built")
    write_repository(folder / "repository")
    assert "recovered\n" in dvc(folder / "repository", "repro")
    dvc(folder / "repository", "push")
    return folder


@pytest.fixture
def repository(built, tmp_path, monkeypatch):
    """What `dvc repro` leaves to a stage after a pull: no outputs, an empty work folder."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "repository"
    shutil.rmtree(folder / "work")
    shutil.rmtree(folder / "data")
    monkeypatch.chdir(folder)
    return folder


def empty(folder):
    shutil.rmtree(folder / "files")


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {}


def test_a_running_stage_recovers_the_files_that_dvc_deleted(repository):
    dvc(repository, "pull")
    assert (repository / "data/features/a.h5").exists()
    (repository / "wish").write_text("a.h5 b.h5 c.h5")
    assert "recovered a.h5 b.h5\n" in dvc(repository, "repro")
    assert set(contents(repository / "data/features")) == {"a.h5", "b.h5", "c.h5"}


def test_the_cache_is_enough(repository, capfd):
    empty(repository.parent / "remote")
    assert recover(["b.h5", "other.h5"], Path("work")) == ["b.h5"]
    assert contents(Path("work")) == {"b.h5": "made of b.h5"}
    assert capfd.readouterr() == ("", "")


def test_the_remote_is_enough(repository, capfd):
    empty(repository / ".dvc/cache")
    assert recover(["b.h5", "other.h5"], Path("work")) == ["b.h5"]
    assert contents(Path("work")) == {"b.h5": "made of b.h5"}
    assert capfd.readouterr() == ("", "")


def test_an_existing_file_stays(repository):
    Path("work").mkdir()
    Path("work/a.h5").write_text("mine")
    assert recover(["a.h5", "b.h5"], Path("work")) == ["b.h5"]
    assert contents(Path("work")) == {"a.h5": "mine", "b.h5": "made of b.h5"}


def test_missing_files_give_one_line_and_the_others_are_copied(repository, capfd):
    for folder in (repository / ".dvc/cache", repository.parent / "remote"):
        for path in list(folder.rglob("*")):
            if path.is_file() and path.read_bytes() == b"made of a.h5":
                path.unlink()
    assert recover(["a.h5", "b.h5"], Path("work")) == ["b.h5"]
    assert contents(Path("work")) == {"b.h5": "made of b.h5"}
    assert capfd.readouterr() == (
        "extract: DVC lacks 1 of the shards, in its cache and its remote\n",
        "",
    )


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("dvc.lock", "{{{ data/features", "dvc.lock"),
        (".dvc/config", "[[[", "config file error"),
        (".dvc/config", SETTINGS.replace("../../remote", "s3://bucket/remote"), "dvc-s3"),
    ],
)
def test_a_failure_of_dvc_gives_one_line(repository, capfd, file, text, words):
    empty(repository / ".dvc/cache")
    Path(file).write_text(text)
    assert recover(["a.h5"], Path("work")) == []
    out, err = capfd.readouterr()
    assert out.startswith("extract: DVC gives no shards: ")
    assert words in out
    assert (out.count("\n"), err) == (1, "")


def test_a_full_disk_in_the_database_of_dvc_gives_one_line(repository, capfd, monkeypatch):
    def fail(*args, **options):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("dvc.repo.Repo.__init__", fail)
    assert recover({"a.h5"}, Path("work")) == []
    said = capfd.readouterr()
    assert said.out == "extract: DVC gives no shards: OperationalError: database or disk is full\n"
    assert said.err == ""


@pytest.mark.parametrize("has_remote", [True, False])
def test_a_lock_file_without_its_objects_gives_one_line(repository, capfd, has_remote):
    """As after a clone of a repository whose owner did not push."""
    empty(repository / ".dvc/cache")
    empty(repository.parent / "remote")
    if not has_remote:
        Path(".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    assert recover(["a.h5"], Path("work")) == []
    out, err = capfd.readouterr()
    assert out.startswith("extract: DVC gives no shards: ")
    assert (out.count("\n"), err) == (1, "")


@pytest.mark.parametrize("missing", ["dvc.lock", "dvc.yaml", ".dvc"])
def test_without_stored_files_nothing_is_printed(repository, capfd, missing):
    Path(missing).rename("elsewhere")
    assert recover(["a.h5"], Path("work")) == []
    assert contents(Path("work")) == {}
    assert capfd.readouterr() == ("", "")
