"""`python -m cache.inspect` and `python -m cache.verify`, as a user calls them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import h5py
import pyarrow as pa
import pyarrow.parquet as pq
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


def test_inspect_escapes_what_of_an_image_steers_a_terminal(store, tmp_path):
    row = {"image_id": [1], "split": ["\x1b[2Jtrain"], "file_name": ["\x1b[2J/cat.jpg"]}
    pq.write_table(pa.table(row), tmp_path / "names.parquet")
    table = ("--images", tmp_path / "names.parquet")
    done = run("cache.inspect", store.root, "--image", "cat.jpg", *table)
    assert done.returncode == 0
    assert done.stdout.startswith("image 1: ")
    assert "\x1b" not in done.stdout


def test_inspect_tells_which_shards_are_not_here(store):
    for name in store.names[:2]:
        (store.root / name).unlink()
    done = run("cache.inspect", store.root)
    assert done.returncode == 0
    assert f"2 of {len(store.names)} shards: {', '.join(sorted(store.names[:2]))}\n" in done.stdout


def write_names(path, image_ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"train/{image_id}/cat.jpg" for image_id in image_ids]
    table = {"image_id": image_ids, "split": ["train"] * len(image_ids), "file_name": names}
    pq.write_table(pa.table(table), path)


def test_inspect_finds_an_image_by_id_and_by_name(store):
    image_id = int(store.image_ids[3])
    shard, row = next(
        (path.name, rows.tolist().index(image_id))
        for path in sorted(store.root.glob("*.h5"))
        if image_id in (rows := h5py.File(path)["image_id"][:])
    )
    line = f"image {image_id}: 'train/{image_id}/cat.jpg', split train, row {row} of {shard}\n"
    write_names(store.root.parent / "index/images.parquet", store.image_ids.tolist())
    for wanted in (image_id, f"train/{image_id}/cat.jpg", f"{image_id}/cat.jpg"):
        assert run("cache.inspect", store.root, "--image", wanted).stdout == line
    assert len(run("cache.inspect", store.root, "--image", "cat.jpg").stdout.splitlines()) > 3


def test_inspect_of_an_image_without_features_or_names_says_so(store, tmp_path):
    write_names(tmp_path / "names.parquet", [-77])
    names = ("--images", tmp_path / "names.parquet")
    found = run("cache.inspect", store.root, "--image", "cat.jpg", *names)
    assert (
        found.stdout
        == "image -77: 'train/-77/cat.jpg', split train, has no features in this store\n"
    )
    other = run("cache.inspect", store.root, "--image", "at.jpg", *names)
    assert (other.returncode, other.stdout) == (2, "")
    assert "no image of this id or name" in other.stderr
    for number in ("9" * 19, "9" * 5000):
        beyond = run("cache.inspect", store.root, "--image", number, *names)
        assert (beyond.returncode, beyond.stderr.count("\n")) == (2, 1)
    nameless = run("cache.inspect", store.root, "--image", "cat.jpg")
    assert nameless.returncode == 2
    assert "Name the table with --images" in nameless.stderr
    by_id = run("cache.inspect", store.root, "--image", store.image_ids[0])
    assert by_id.stdout.startswith(f"image {store.image_ids[0]}: row 0 of ")


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


def test_repair_is_offered_only_where_there_is_a_file_to_delete(store, tmp_path):
    assert "--repair" not in run("cache.verify", tmp_path).stderr
    flip_a_feature(store.root / store.names[0])
    assert "--repair" in run("cache.verify", store.root).stderr


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
