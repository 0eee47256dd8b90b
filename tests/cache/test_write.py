"""A store from arrays: the same bytes whatever the order of its rows, and however often killed."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cache import (
    CacheError,
    FeatureStore,
    InvalidFeaturesError,
    SettingsError,
    Spec,
    SpecMismatchError,
    unfinished_ids,
    write_store,
)
from cache import write as module
from cache.errors import PatchcacheError
from cache.store_index import StoreIndex
from cache.write import UNFINISHED

ROOT = Path(__file__).parents[2]
SHARD_ROWS = 5
"""That of `build_store`."""

KILLED = """
import sys, time
import numpy as np
from pathlib import Path
from cache import FeatureStore, publish, shard, unfinished_ids, write, write_store
from cache.files.row_spool import RowSpool

def slow(function):
    return lambda *arguments, **options: (time.sleep(0.01), function(*arguments, **options))[1]

RowSpool.append = slow(RowSpool.append)
write.write_bytes = slow(write.write_bytes)
publish.link_or_copy = slow(publish.link_or_copy)
store = FeatureStore(sys.argv[1])
chosen = np.random.default_rng(int(sys.argv[3])).permutation(store.image_ids)
print("ready", flush=True)
rows = ((i, i, store.gather([i])[0]) for i in chosen.tolist())
write_store(sys.argv[2], store.spec, rows, shard_rows=5)
"""


class Given(NamedTuple):
    """What a store is made of."""

    spec: Spec
    rows: list[tuple[int, int, np.ndarray]]


@pytest.fixture
def given(store):
    """The rows of a store of other tests, in order of id; the hash of each file is its id."""
    rows = zip(store.image_ids.tolist(), store.image_ids.tolist(), store.features, strict=True)
    return Given(store.spec, list(rows))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "mine"


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder, given, rows=None):
    return write_store(folder, given.spec, given.rows if rows is None else rows, shard_rows=5)


def stop():
    raise KeyboardInterrupt


def cut_after(rows, count):
    """The rows, of which so many arrive before the writer is stopped."""
    yield from rows[:count]
    stop()


def cut_write(folder, given, count):
    with pytest.raises(KeyboardInterrupt):
        write(folder, given, cut_after(given.rows, count))


# What is written


def test_a_store_written_again_from_its_rows_is_the_same_bytes(store, given, folder):
    written = write(folder, given)
    assert bytes_of(folder) == bytes_of(store.root)
    assert written.verify(deep=True).ok
    assert np.array_equal(written.gather(store.image_ids), store.features)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_rows_changes_no_byte(store, given, folder, seed):
    order = np.random.default_rng(seed).permutation(len(given.rows)).tolist()
    write(folder, given, (given.rows[n] for n in order))
    assert bytes_of(folder) == bytes_of(store.root)


def test_every_bit_of_a_row_comes_back(given, folder):
    patterns = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = patterns[np.isfinite(patterns)]
    size = given.spec.patches * given.spec.width
    rows = finite[: len(finite) // size * size].reshape(-1, given.spec.patches, given.spec.width)
    written = write(folder, given, [(n, 2**64 - 1 - n, row) for n, row in enumerate(rows)])
    assert written.gather(written.image_ids).tobytes() == rows.tobytes()
    index = StoreIndex.read(folder / "index.parquet", given.spec)
    assert index.source_xxh3[:2].tolist() == [2**64 - 1, 2**64 - 2]


def test_arrays_of_any_layout_and_numbers_of_numpy_are_taken(store, given, folder):
    rows = [
        (np.int64(image_id), np.uint64(source), np.asfortranarray(row))
        for image_id, source, row in given.rows
    ]
    write(folder, given, rows)
    assert bytes_of(folder) == bytes_of(store.root)


def test_tensors_are_taken(store, given, folder):
    write(folder, given, [(i, s, torch.from_numpy(row)) for i, s, row in given.rows])
    assert bytes_of(folder) == bytes_of(store.root)


@pytest.mark.parametrize(
    "image_ids", [[-(2**63)], [-1], [0], [2**63 - 1], [-(2**63), 2**63 - 1], [-(2**62) - 1, 2**62]]
)
def test_the_whole_range_of_ids_is_taken(given, folder, image_ids):
    rows = [(image_id, 1, given.rows[0][2]) for image_id in image_ids]
    written = write_store(folder, given.spec, rows, shard_rows=100)
    assert written.image_ids.tolist() == image_ids
    assert written.verify().ok


def test_rows_are_taken_one_by_one_and_memory_holds_a_shard(given, folder, monkeypatch):
    held = []
    real = module.RowSpool.gather
    monkeypatch.setattr(
        module.RowSpool, "gather", lambda self, ids: (held.append(len(ids)), real(self, ids))[1]
    )
    write(folder, given, iter(given.rows))
    assert sum(held) == len(given.rows)
    assert max(held) <= 2 * SHARD_ROWS


def test_the_index_is_written_last(given, folder, monkeypatch):
    published = []
    real = os.replace

    def replace_logged(source, target):
        real(source, target)
        if Path(target).parent == folder:
            published.append(Path(target).name)

    monkeypatch.setattr(os, "replace", replace_logged)
    write(folder, given)
    assert published[-2:] == ["spec.json", "index.parquet"]
    assert sorted(published) == sorted(bytes_of(folder))


def test_writing_again_replaces_the_store(store, given, folder):
    write(folder, given, given.rows[:20])
    write(folder, given)
    assert bytes_of(folder) == bytes_of(store.root)
    assert len(write(folder, given, given.rows[:1])) == 1


def test_other_features_of_a_stores_images_do_not_replace_it_under_its_index(given, folder):
    """Shards are named by their images: readers would get features of both."""
    write(folder, given)
    before = bytes_of(folder)
    others = [(i, s, np.roll(row, 1, axis=0)) for i, s, row in given.rows]
    with pytest.raises(InvalidFeaturesError, match=r"holds other features of the same images.*"):
        write(folder, given, others)
    shutil.move(folder / UNFINISHED, folder.parent / "kept")
    assert bytes_of(folder) == before
    shutil.move(folder.parent / "kept", folder / UNFINISHED)
    (folder / "index.parquet").unlink()
    written = write(folder, given, [])
    assert np.array_equal(written.gather(written.image_ids), [row for _, _, row in others])


def test_a_store_with_an_unreadable_index_is_replaced(store, given, folder):
    write(folder, given, given.rows[:20])
    (folder / "index.parquet").write_bytes(b"damaged")
    write(folder, given)
    assert bytes_of(folder) == bytes_of(store.root)


# Stopped and continued


@pytest.mark.parametrize("count", [0, 1, 31, 59])
def test_rows_given_again_after_a_stop_end_in_the_same_bytes(store, given, folder, count):
    cut_write(folder, given, count)
    with pytest.raises(CacheError):
        FeatureStore(folder)
    assert unfinished_ids(folder).tolist() == store.image_ids[:count].tolist()
    write(folder, given, reversed(given.rows))
    assert bytes_of(folder) == bytes_of(store.root)


def test_rows_that_are_kept_may_be_left_out(store, given, folder):
    cut_write(folder, given, 40)
    kept = set(unfinished_ids(folder).tolist())
    assert len(kept) == 40
    write(folder, given, [row for row in given.rows if row[0] not in kept])
    assert bytes_of(folder) == bytes_of(store.root)
    assert unfinished_ids(folder).tolist() == []


def test_finished_shards_are_kept(store, given, folder, monkeypatch):
    real, calls = module.write_bytes, iter(range(1, 100))

    def stop_at_the_fifth(path, *pieces):
        if path.suffix == ".h5" and next(calls) == 5:
            stop()
        real(path, *pieces)

    monkeypatch.setattr(module, "write_bytes", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        write(folder, given)
    finished = {path.name: path.stat().st_ino for path in (folder / UNFINISHED).glob("*.h5")}
    assert len(finished) == 4
    monkeypatch.undo()
    write(folder, given, given.rows[:1])
    assert bytes_of(folder) == bytes_of(store.root)
    assert {name: (folder / name).stat().st_ino for name in finished} == finished


def test_a_damaged_finished_shard_is_written_again(store, given, folder, monkeypatch):
    monkeypatch.setattr(module, "publish", lambda *arguments: stop())
    with pytest.raises(KeyboardInterrupt):
        write(folder, given)
    monkeypatch.undo()
    for path in list((folder / UNFINISHED).glob("*.h5"))[:2]:
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    write(folder, given, given.rows[:1])
    assert bytes_of(folder) == bytes_of(store.root)


def test_a_stop_before_the_rows_are_deleted_loses_nothing(store, given, folder, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments: stop())
    with pytest.raises(KeyboardInterrupt):
        write(folder, given)
    monkeypatch.undo()
    write(folder, given)
    assert bytes_of(folder) == bytes_of(store.root)


def test_a_picture_that_changed_in_between_counts_as_it_is_now(store, given, folder):
    image_id, _, row = given.rows[3]
    changed = [*given.rows]
    changed[3] = (image_id, 12345, row * np.float16(2))
    with pytest.raises(KeyboardInterrupt):
        write(folder, given, cut_after(changed, 40))
    write(folder, given)
    assert bytes_of(folder) == bytes_of(store.root)


def test_rows_that_differ_in_their_last_bits_are_the_same_encoder(store, given, folder):
    cut_write(folder, given, 40)
    noisy = [(i, s, (row * np.float16(1.001)).astype(np.float16)) for i, s, row in given.rows]
    assert not np.array_equal(noisy[0][2], given.rows[0][2])
    written = write(folder, given, noisy)
    assert np.array_equal(written.gather(store.image_ids[:40]), store.features[:40])


def test_rows_of_an_encoder_that_changed_in_between_are_refused(given, folder):
    cut_write(folder, given, 40)
    others = [(i, s, np.roll(row, 1, axis=0)) for i, s, row in given.rows]
    with pytest.raises(InvalidFeaturesError, match=f"image {given.rows[0][0]}: its features are"):
        write(folder, given, others)
    assert len(unfinished_ids(folder)) == 40


@pytest.mark.slow("kills a writer at random moments")
def test_killed_at_random_moments_it_ends_in_the_same_bytes(store, folder):
    rng = np.random.default_rng(0)
    kept, killed = [0], 0
    for seed in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(store.root), str(folder), str(seed)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.1, 0.9))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        child.stdout.close()
        if (folder / "index.parquet").exists():
            break
        kept.append(len(unfinished_ids(folder)))
    assert killed >= 3
    assert kept == sorted(kept)
    assert 0 < kept[1] < len(store.image_ids)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.root), str(folder), "99"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0
    assert bytes_of(folder) == bytes_of(store.root)


# Refused


def bad_rows(spec):
    good = np.ones((spec.patches, spec.width), np.float16)
    infinite, nan = good.copy(), good.copy()
    infinite[1, 2], nan[0, :2] = np.inf, np.nan
    return {
        "no triple": ((1, 2), r"row 1: is no \(image_id, source_xxh3, features\)"),
        "no row": (None, r"row 1: is no"),
        "id is no integer": ((1.5, 2, good), r"row 1: is no"),
        "hash is a text": ((1, "ab", good), r"row 1: is no"),
        "id too large": ((2**63, 2, good), r"row 1: image 9223372036854775808: ids are int64"),
        "id too small": ((-(2**63) - 1, 2, good), r"ids are int64"),
        "hash negative": ((1, -2, good), r"image 1: source_xxh3 is -2, wanted an unsigned"),
        "hash too large": ((1, 2**64, good), r"source_xxh3 is 18446744073709551616"),
        "float32": ((1, 2, good.astype(np.float32)), r"float32 \(4, 6\), wanted float16 \(4, 6\)"),
        "big-endian": ((1, 2, good.astype(">f2")), r"its features are >f2"),
        "integers": ((1, 2, np.ones((4, 6), int)), r"its features are int64"),
        "transposed": ((1, 2, good.T), r"float16 \(6, 4\), wanted float16 \(4, 6\)"),
        "a batch": ((1, 2, good[None]), r"float16 \(1, 4, 6\), wanted"),
        "no array": ((1, 2, None), r"its features are object \(\)"),
        "infinite": ((1, 2, infinite), r"image 1: 1 of its values are not finite"),
        "nan": ((1, 2, nan), r"image 1: 2 of its values are not finite.*another layer"),
        "twice": ((0, 0, good), r"row 1: image 0 comes a second time"),
    }


KINDS = list(bad_rows(Spec.external(model="m", about="a", patches=4, width=6)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_no_store_can_hold_is_refused_and_those_before_are_kept(given, folder, kind):
    bad, text = bad_rows(given.spec)[kind]
    good = (0, 0, np.ones((4, 6), np.float16))
    with pytest.raises(InvalidFeaturesError, match=text) as caught:
        write(folder, given, [good, bad])
    assert "\n" not in str(caught.value)
    assert unfinished_ids(folder).tolist() == [0]
    assert [path.name for path in folder.iterdir()] == [UNFINISHED]


def test_no_rows_are_no_store(given, folder):
    with pytest.raises(InvalidFeaturesError, match="no row was given"):
        write(folder, given, [])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": "float32"}, "dtype is 'float32'"),
        ({"format": "patchcache/2"}, "format is 'patchcache/2'"),
        ({"patches": 0}, "patches is 0"),
        ({"width": np.int64(6)}, r"width is np.int64\(6\)"),
        ({"mean": [0.5]}, r"mean is \[0.5\]"),
        ({"std": (float("nan"),)}, r"std is \(nan,\)"),
        ({"about": "x" * 40_000}, "takes 40[0-9]{3} bytes as JSON, wanted at most 32768"),
    ],
)
def test_a_spec_that_no_store_has_is_refused_before_any_row(given, folder, changes, text):
    with pytest.raises(InvalidFeaturesError, match=text):
        write(folder, Given(replace(given.spec, **changes), []), cut_after([], 0))
    assert not folder.exists()


@pytest.mark.parametrize("shard_rows", [0, -5])
def test_shards_without_rows_are_refused(given, folder, shard_rows):
    with pytest.raises(InvalidFeaturesError, match=f"shard_rows is {shard_rows}, wanted 1"):
        write_store(folder, given.spec, given.rows, shard_rows=shard_rows)


def test_a_store_of_another_spec_is_not_written_into(store, given):
    before = bytes_of(store.root)
    other = replace(given.spec, layer=-1)
    with pytest.raises(SpecMismatchError, match="layer is -2, wanted -1"):
        write(store.root, Given(other, given.rows))
    assert {name: bytes_of_file(store.root / name) for name in before} == before


def bytes_of_file(path):
    return path.read_bytes()


def test_rows_of_another_spec_are_not_continued(given, folder):
    cut_write(folder, given, 3)
    with pytest.raises(SpecMismatchError, match=r"delete it to begin anew.*model is 'tiny'"):
        write(folder, Given(replace(given.spec, model="other"), given.rows))
    assert len(unfinished_ids(folder)) == 3


def test_a_folder_with_other_files_is_left_alone(given, folder):
    folder.mkdir()
    (folder / "mine.h5").write_bytes(b"mine")
    with pytest.raises(SettingsError, match=r"holds mine\.h5 and is no store"):
        write(folder, given)
    assert bytes_of(folder) == {"mine.h5": b"mine"}


def test_a_folder_with_an_index_of_another_program_is_left_alone(given, folder):
    folder.mkdir()
    (folder / "index.parquet").write_bytes(b"mine")
    for unfinished in (False, True):
        with pytest.raises(SettingsError, match=r"holds .*index\.parquet and is no store"):
            write(folder, given)
        assert (folder / "index.parquet").read_bytes() == b"mine"
        if not unfinished:
            (folder / UNFINISHED).mkdir()


def test_a_spec_of_another_program_is_not_replaced(given, folder):
    cut_write(folder, given, 3)
    (folder / "spec.json").write_text("{}")
    with pytest.raises(SpecMismatchError, match=r"spec\.json"):
        write(folder, given)
    assert (folder / "spec.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["labels.h5", ".notes.partial", "notes.txt", "0123.h5"])
@pytest.mark.parametrize("count", [3, 60])
def test_files_that_are_no_part_of_a_store_stay(store, given, folder, name, count):
    if count < len(given.rows):
        cut_write(folder, given, count)
    else:
        write(folder, given, given.rows[:20])
    (folder / name).write_bytes(b"mine")
    write(folder, given)
    assert bytes_of(folder) == bytes_of(store.root) | {name: b"mine"}


@pytest.mark.parametrize("name", [".lock", "rows", "records"])
@pytest.mark.parametrize("make", [lambda path: path.symlink_to("../../target"), os.mkfifo])
def test_nothing_is_written_through_a_link_or_a_pipe(given, folder, tmp_path, name, make):
    path = folder / UNFINISHED / name
    path.parent.mkdir(parents=True)
    (tmp_path / "target").write_bytes(b"mine")
    make(path)
    with pytest.raises(PatchcacheError, match=rf"{path}: a link, or no ordinary file"):
        write(folder, given)
    assert (tmp_path / "target").read_bytes() == b"mine"


def test_no_folder_behind_a_link_is_filled(given, folder, tmp_path):
    (tmp_path / "target").mkdir()
    folder.mkdir()
    (folder / UNFINISHED).symlink_to(tmp_path / "target")
    with pytest.raises(SettingsError, match=rf"{folder / UNFINISHED}: a link, or no folder"):
        write(folder, given)
    assert list((tmp_path / "target").iterdir()) == []


def test_an_empty_folder_is_taken(store, given, folder):
    folder.mkdir()
    write(folder, given)
    assert bytes_of(folder) == bytes_of(store.root)


def test_a_url_is_refused(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(SettingsError, match=r"s3://bucket/mine: stores are written to folders"):
        write("s3://bucket/mine", given)
    assert set(tmp_path.iterdir()) == before


def refused_elsewhere(store, folder):
    """Whether another process may not write the store."""
    program = (
        "import sys; from cache import FeatureStore, write_store\n"
        "store = FeatureStore(sys.argv[1]); write_store(sys.argv[2], store.spec, [])"
    )
    other = subprocess.run(
        [sys.executable, "-c", program, str(store.root), str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return re.search("CacheError: .*another process works in it", other.stderr)


def test_two_writers_of_one_store_are_refused(store, given, folder):
    def rows():
        yield from given.rows[:10]
        assert refused_elsewhere(store, folder)
        yield from given.rows[10:]

    write(folder, given, rows())
    assert bytes_of(folder) == bytes_of(store.root)


def test_a_second_call_of_the_process_is_refused_and_lets_no_other_process_in(store, given, folder):
    def rows():
        yield from given.rows[:10]
        with pytest.raises(CacheError, match="this process works in it already"):
            write(folder, given)
        assert refused_elsewhere(store, folder)
        yield from given.rows[10:]

    write(folder, given, rows())
    assert bytes_of(folder) == bytes_of(store.root)


def test_a_full_disk_is_told_before_the_shards_and_the_rows_are_kept(
    store, given, folder, monkeypatch
):
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"the shards need 2\.8 KiB.*rows are kept") as caught:
        write(folder, given)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(folder / UNFINISHED)
    monkeypatch.undo()
    write(folder, given, given.rows[:1])
    assert bytes_of(folder) == bytes_of(store.root)


def test_on_a_file_system_without_locks_the_store_is_written(store, given, folder, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    write(folder, given)
    assert bytes_of(folder) == bytes_of(store.root)


# The spec of other features


def test_a_spec_says_what_made_the_features(folder):
    spec = Spec.external(
        model="my-net",
        about="Last map before pooling; ä, 日本, 🐙\nversion 3",
        patches=4,
        width=6,
        weights_sha256="cd" * 32,
        image_size=224,
        mean=[0.5, 0.5, 0.5],
    )
    write_store(folder, spec, [(1, 2, np.zeros((4, 6), np.float16))])
    store = FeatureStore(folder)
    assert store.spec == spec
    assert (store.spec.tokens, store.spec.image_size, store.spec.batch_size) == ("grid", 224, 0)
    assert store.verify().ok


def test_the_longest_spec_is_read_back(folder):
    short = Spec.external(model="m", about="x", patches=4, width=6)
    text = "x" * (2**15 - len(short.to_json()) + 1)
    spec = replace(short, about=text)
    assert len(spec.to_json()) == 2**15
    write_store(folder, spec, [(1, 2, np.zeros((4, 6), np.float16))])
    assert FeatureStore(folder).verify().ok
