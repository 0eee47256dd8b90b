"""`workspace.gc` frees what no store needs, and only when it is sure of what the stores need."""

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cache.errors import PatchcacheError
from cache.files.atomic import sha256_of
from cache.texts import human_size
from workspace import gc as module
from workspace.errors import StageError
from workspace.gc import collect
from workspace.locks import folder_lock
from workspace.paths import SHARDS

ROOT = Path(__file__).parents[2]

FEATURES = "data/features"

HOLD = """
import sys
from pathlib import Path
from workspace.locks import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "workspace.gc", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@contextlib.contextmanager
def extraction_in(folder):
    """Another process that holds the lock of a work directory."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield
        process.stdin.close()


def finish_all(store):
    """What an extraction leaves in the work directory of a store, which is linked into it."""
    SHARDS.mkdir(parents=True, exist_ok=True)
    for name in store.names:
        path = SHARDS / name
        if not path.exists():
            os.link(store.root / name, path)
        path.with_suffix(".sha256").write_text(sha256_of(path))
    probe = SHARDS / f"probe-{store.spec.fingerprint[:16]}.safetensors"
    probe.write_bytes(b"probe of " + store.spec.fingerprint.encode())
    probe.with_suffix(".sha256").write_text(sha256_of(probe))


def names():
    return {path.name for path in SHARDS.iterdir()}


@pytest.fixture
def folder(tmp_path, build_store, monkeypatch):
    """A workspace with a store that was published."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    finish_all(build_store(Path(FEATURES)))
    (SHARDS / ".lock").touch()
    return tmp_path


@pytest.fixture
def needed(folder):
    return names()


@pytest.fixture
def other(folder, build_store, spec):
    """The store of another tower, whose shards lie in the same work directory."""
    made = build_store(folder / "other", spec=replace(spec, layer=-1))
    finish_all(made)
    return made


@pytest.fixture
def unneeded(needed, other):
    """What lies there beside `needed`: another tower's, and what a kill leaves."""
    shutil.rmtree(other.root)
    name = next(name for name in needed if name.endswith(".h5"))
    for stale in (f".{name}.new", f"..{name}.new.partial", f".{name[:-3]}.sha256.partial"):
        (SHARDS / stale).write_bytes(b"half")
    (SHARDS / "0123456789abcdef.sha256").write_text("without its shard")
    (SHARDS / ".probe-0123456789abcdef.safetensors.new").write_bytes(b"half")
    return names() - needed


def test_it_shows_what_it_would_free_and_keeps_it(needed, unneeded, folder):
    done = run(folder)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {str(SHARDS / name) for name in unneeded}
    shards = sum(name.endswith(".h5") for name in unneeded)
    assert shards > 5
    assert f"{shards} shards and " in last
    assert last.endswith("can be freed with --delete")
    assert names() == needed | unneeded


def test_delete_frees_exactly_what_no_store_needs(needed, unneeded, folder):
    before = {path.name: path.read_bytes() for path in Path(FEATURES).iterdir()}
    done = run(folder, "--delete")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("iB freed\n")
    assert names() == needed
    assert {path.name: path.read_bytes() for path in Path(FEATURES).iterdir()} == before
    assert run(folder, "--delete").stdout == f"{SHARDS}: 0 shards and 0 bytes freed\n"


def test_every_kind_of_leftover_is_tried(unneeded):
    endings = {name[name.find(".", 2) :] for name in unneeded}
    assert endings >= {".h5", ".sha256", ".h5.new", ".h5.new.partial", ".sha256.partial"}
    assert any(name.startswith("probe-") for name in unneeded)


def test_shards_of_every_named_store_are_kept(needed, other):
    both = names()
    assert both > needed
    collect([FEATURES, str(other.root)], delete=True)
    assert names() == both
    collect([str(other.root)], delete=True)
    assert {name for name in names() if name.endswith(".h5")} == set(other.names)


def test_a_shard_that_two_stores_share_is_kept_for_either(needed, build_store, folder):
    other = build_store(folder / "same", seed=0)
    assert set(other.names) <= needed
    shutil.rmtree(FEATURES)
    collect([str(other.root)], delete=True)
    assert names() == needed


def test_a_store_is_named_by_its_url_too(needed, unneeded):
    collect([f"file://{Path(FEATURES).resolve()}"], delete=True)
    assert names() == needed


def test_it_says_what_stays_since_dvc_has_it_too(needed, other, folder):
    large = sum(path.stat().st_size for path in other.root.glob("*.h5"))
    assert large > 2**14
    out = run(folder).stdout.splitlines()[-1]
    assert out.endswith(f", but for {human_size(large)} that DVC or a store has too")
    shutil.rmtree(other.root)
    assert "too" not in run(folder).stdout.splitlines()[-1]


@pytest.mark.parametrize("missing", [".", "spec.json", "index.parquet"])
def test_without_a_whole_store_nothing_is_freed(needed, unneeded, folder, missing):
    """An extraction that failed leaves no store, and all that it has finished."""
    path = Path(FEATURES, missing)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = run(folder, "--delete")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith((f"error: {FEATURES}/", f"error: {FEATURES}: no such folder"))
    assert done.stderr.count("\n") == 1
    assert names() == needed | unneeded


def test_one_store_that_cannot_be_read_keeps_all(needed, unneeded):
    for stores in ([FEATURES, "nowhere"], ["nowhere", FEATURES]):
        with pytest.raises(PatchcacheError, match="nowhere"):
            collect(stores, delete=True)
    (Path(FEATURES) / "index.parquet").write_bytes(b"no index")
    with pytest.raises(PatchcacheError, match=r"index\.parquet"):
        collect([FEATURES], delete=True)
    assert names() == needed | unneeded


def test_while_an_extraction_works_nothing_is_freed(needed, unneeded, folder):
    with extraction_in(SHARDS):
        done = run(folder, "--delete")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"error: {SHARDS}: another process works in it.")
        assert done.stderr.count("\n") == 1
        assert names() == needed | unneeded
    assert run(folder, "--delete").returncode == 0
    assert names() == needed


def test_the_stores_are_read_while_no_extraction_can_publish(needed, monkeypatch):
    """What was published between the reading and the deleting would be lost."""
    real = module.needed_names

    def held(store):
        with extraction_refused():
            return real(store)

    monkeypatch.setattr(module, "needed_names", held)
    collect([FEATURES], delete=True)
    assert names() == needed


@contextlib.contextmanager
def extraction_refused():
    code = HOLD.replace('"held"', '"taken"')
    done = subprocess.run(
        [sys.executable, "-c", code, SHARDS],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        input="",
    )
    assert "another process works in it" in done.stderr
    yield


def test_the_lock_is_for_one_at_a_time(folder):
    refused = pytest.raises(StageError, match="Wait until it is done")
    with extraction_in(SHARDS), refused, folder_lock(SHARDS):
        pytest.fail("two at a time")
    with folder_lock(SHARDS):
        pass


@pytest.mark.parametrize("arguments", [[], ["--delete"], ["elsewhere"]])
def test_without_a_work_directory_there_is_nothing_to_do(tmp_path, arguments):
    done = run(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{SHARDS}: no such folder, so there is nothing to free\n"
    assert not list(tmp_path.iterdir())


def test_folders_are_left_alone(needed):
    (SHARDS / "folder").mkdir()
    (SHARDS / "link").symlink_to("nowhere")
    collect([FEATURES], delete=True)
    assert names() == needed | {"folder", "link"}


def test_an_unknown_option_is_a_wrong_call(folder):
    done = run(folder, "--force")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
