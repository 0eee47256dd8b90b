"""`python -m cache.inspect` and `python -m cache.verify`, as a user calls them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def flip_a_feature(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_inspect_tells_counts_shape_and_encoder(store):
    done = run("cache.inspect", store.root)
    assert done.returncode == 0
    assert f"{len(store.image_ids)} images in {len(store.names)} shards" in done.stdout
    assert store.spec.fingerprint in done.stdout
    assert f"[{store.spec.patches}, {store.spec.width}]" in done.stdout


def test_inspect_escapes_what_steers_a_terminal(tmp_path, build_store, spec):
    model = "\ud800\x1b[31m"
    build_store(tmp_path / "features", spec=dataclasses.replace(spec, model=model))
    done = run("cache.inspect", tmp_path / "features")
    assert (done.returncode, done.stderr) == (0, "")
    assert repr(model) in done.stdout


def test_inspect_tells_which_shards_are_not_here(store):
    for name in store.names[:2]:
        (store.root / name).unlink()
    done = run("cache.inspect", store.root)
    assert done.returncode == 0
    assert f"2 of {len(store.names)} shards: {', '.join(sorted(store.names[:2]))}\n" in done.stdout


def test_inspect_of_another_folder_is_one_line(tmp_path):
    done = run("cache.inspect", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["cache.inspect", "cache.verify"])
def test_a_folder_that_does_not_exist_is_named(tmp_path, command):
    done = run(command, tmp_path / "nowhere")
    assert done.returncode == 1
    assert f"{tmp_path / 'nowhere'}: no such folder" in done.stdout + done.stderr
    assert "--repair" not in done.stderr


def test_verify_finds_nothing_in_a_good_store(store):
    done = run("cache.verify", store.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(store.names)} shards, all bytes are those that were written" in done.stdout


def test_verify_gives_each_bad_shard_one_line_and_leaves_it(store):
    flipped, missing = store.names[0], store.names[1]
    flip_a_feature(store.root / flipped)
    (store.root / missing).unlink()
    done = run("cache.verify", store.root)
    assert done.returncode == 1
    assert [flipped in line or missing in line for line in done.stdout.splitlines()] == [True, True]
    assert (store.root / flipped).exists()


def test_shallow_verify_does_not_read_the_features(store):
    flip_a_feature(store.root / store.names[0])
    assert run("cache.verify", store.root, "--shallow").returncode == 0


def test_repair_deletes_the_bad_shards_and_no_other(store):
    flip_a_feature(store.root / store.names[0])
    done = run("cache.verify", store.root, "--repair")
    assert done.returncode == 1
    assert "run the extract stage" in done.stderr.lower()
    assert {path.name for path in store.root.glob("*.h5")} == set(store.names[1:])
