"""Findings of a verification; test_commands.py tests the command."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.audit import audit
from cache.errors import CorruptShardError
from cache.files.atomic import canonical_json, sha256_of
from cache.plan import plan_shards
from cache.remote.location import Location
from cache.shard import open_shard, write_shard
from cache.store_index import ShardFile, StoreIndex
from cache.verify import verify

pytestmark = pytest.mark.slow("damages a store in a thousand ways")


def check(root, deep=True, **options):
    return audit(Location(root), deep=deep, **options)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << place % 8
    path.write_bytes(data)


def one_shard(root, spec, features):
    """A store of one shard that holds these features, with hashes that fit."""
    image_ids = np.arange(len(features)) + 20
    (planned,) = plan_shards(image_ids, image_ids.astype(np.uint64), spec.fingerprint, 10**6)
    write_shard(root / planned.name, spec, image_ids, features)
    shard = open_shard(root / planned.name, spec)
    file = ShardFile(planned.name, shard.path.stat().st_size, sha256_of(shard.path))
    zeros = np.zeros(len(image_ids), np.int32)
    StoreIndex(
        spec.fingerprint,
        (file,),
        image_ids,
        zeros,
        np.arange(len(image_ids), dtype=np.int32),
        shard.row_xxh3,
        planned.source_xxh3,
    ).write(root / "index.parquet")
    (root / "spec.json").write_bytes(spec.to_json())
    return planned.name


@pytest.mark.parametrize("deep", [True, False])
def test_an_untouched_store_has_no_problem(store, deep):
    report = check(store.root, deep)
    assert (report.ok, report.problems, report.bad_files) == (True, [], [])


def test_a_flipped_bit_anywhere_is_found(store):
    """Two hundred places, spread over the files by their size, and the edges of each file."""
    names = [path.name for path in sorted(store.root.iterdir())]
    sizes = np.array([(store.root / name).stat().st_size for name in names])
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(names), 200, p=sizes / sizes.sum())
    places = [(n, int(rng.integers(sizes[n]))) for n in drawn]
    places += [(n, place) for n in range(len(names)) for place in (0, int(sizes[n]) - 1)]
    assert {names[n] for n, _ in places} == set(names)
    for number, place in places:
        path = store.root / names[number]
        flip(path, place)
        assert check(store.root).bad_files == [path.name], (path.name, place)
        flip(path, place)
    assert check(store.root).ok


def test_a_flipped_feature_is_found_by_the_deep_check_alone_and_named_by_its_image(store):
    path = store.root / store.names[1]
    shard = open_shard(path, store.spec)
    flip(path, shard.offset)
    assert check(store.root, deep=False).ok
    report = check(store.root)
    assert report.bad_files == [path.name]
    assert "1 rows have another hash" in report.problems[0]
    assert f"images {shard.image_ids[0]}." in report.problems[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_values_that_are_not_finite_are_found_though_all_hashes_fit(
    tmp_path, spec, make_rows, value, row
):
    features = make_rows(3)
    features[row, -1, -1] = value
    name = one_shard(tmp_path, spec, features)
    report = check(tmp_path)
    assert report.bad_files == [name]
    assert f"images {20 + row}." in report.problems[0]


def test_the_largest_numbers_are_finite(tmp_path, spec):
    features = np.full((3, spec.patches, spec.width), 65504, np.float16)
    features[1] *= -1
    one_shard(tmp_path, spec, features)
    assert check(tmp_path).ok


def test_rows_larger_and_smaller_than_a_block_are_all_read(tmp_path, spec, make_rows, monkeypatch):
    name = one_shard(tmp_path, spec, make_rows(50))
    offset = open_shard(tmp_path / name, spec).offset
    for block_bytes in (1, 47, 48, 49, 480, 10**6):
        monkeypatch.setattr("cache.audit.BLOCK_BYTES", block_bytes)
        assert check(tmp_path).ok
        for place in (offset, offset + 50 * 48 - 1, 0, -1):
            flip(tmp_path / name, place)
            assert not check(tmp_path).ok
            flip(tmp_path / name, place)


def test_hashes_of_image_files_are_held_against_the_name_of_the_shard(store):
    """The index alone has them, and the next extraction goes by them."""
    path = store.root / "index.parquet"
    table = pq.read_table(path)
    values = table["source_xxh3"].to_pylist()
    values[0] ^= 1
    changed = table.set_column(4, "source_xxh3", pa.array(values, pa.uint64()))
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"file_sha256"}
    pq.write_table(changed.replace_schema_metadata(metadata), path)
    report = check(store.root, deep=False)
    assert report.bad_files == [table["shard"][0].as_py()]
    assert "make the name" in report.problems[0]


def test_each_bad_shard_is_one_line_and_other_files_are_let_be(store):
    flip(store.root / store.names[0], -1)
    (store.root / store.names[1]).unlink()
    (store.root / "notes.txt").touch()
    report = check(store.root)
    assert sorted(report.bad_files) == sorted(store.names[:2])
    assert not any("\n" in problem for problem in report.problems)


def test_a_partial_store_may_lack_shards_and_nothing_else(store):
    (store.root / store.names[1]).unlink()
    assert check(store.root).bad_files == [store.names[1]]
    assert check(store.root, partial=True).ok
    flip(store.root / store.names[2], -1)
    assert check(store.root, partial=True).bad_files == [store.names[2]]


@pytest.mark.parametrize("name", ["spec.json", "index.parquet"])
def test_without_spec_or_index_that_is_the_problem(store, name):
    (store.root / name).unlink()
    assert check(store.root).bad_files == [name]


def test_a_probe_that_is_not_the_one_of_the_index_is_found(store):
    path = store.root / "index.parquet"
    table = StoreIndex.read(path, store.spec)
    digest = hashlib.sha256(b"features").hexdigest()
    StoreIndex(
        **{name: getattr(table, name) for name in table.__dataclass_fields__}
        | {"probe_sha256": digest}
    ).write(path)
    assert check(store.root).bad_files == ["probe.safetensors"]
    (store.root / "probe.safetensors").write_bytes(b"feature")
    assert check(store.root).bad_files == ["probe.safetensors"]
    (store.root / "probe.safetensors").write_bytes(b"features")
    assert check(store.root).ok


def test_progress_counts_the_bytes_of_all_features(store):
    done = []
    check(store.root, progress=lambda *counts: done.append(counts))
    assert {total for _, total in done} == {sum(count for count, _ in done)}
    assert done[0][1] == store.features.nbytes


def test_a_store_of_another_version_of_the_format_is_a_problem_but_not_bad(store):
    path = store.root / "spec.json"
    values = json.loads(path.read_bytes()) | {"format": "patchcache/2", "more": [1, 2]}
    del values["fingerprint"]
    values["fingerprint"] = hashlib.sha256(canonical_json(values)).hexdigest()
    path.write_bytes(canonical_json(values))
    report = check(store.root)
    assert "format is 'patchcache/2'" in report.problems[0]
    assert report.bad_files == []
    with pytest.raises(CorruptShardError, match=r"deleted: 0\. No file is known to be damaged"):
        verify(str(store.root), deep=True, repair=True)
    values["more"] = [1, 3]
    path.write_bytes(canonical_json(values))
    assert check(store.root).bad_files == ["spec.json"]


def test_a_file_that_cannot_be_read_is_a_problem_but_not_bad(store, monkeypatch):
    def refuse(path, spec):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("cache.layout.open_shard", refuse)
    report = check(store.root)
    assert len(report.problems) == len(store.names)
    assert report.bad_files == []


@pytest.mark.parametrize(
    ("place", "raised"),
    [
        ("cache.shard.h5py.h5g.open", ValueError("Unable to open group (errno = 5, error message")),
        (
            "cache.shard.h5py.h5o.get_info",
            RuntimeError("Can't get info (file read: errno = 5, err"),
        ),
        ("cache.shard._read", OSError(5, "Can't read data (file read failed:\nerrno = 5, error")),
        (
            "cache.store_index.pq.ParquetFile",
            OSError(5, "Error reading bytes. Detail: [errno 5] I"),
        ),
        ("cache.audit.check_own_hash", OSError(5, "Input/output error", "a/index.parquet")),
    ],
)
def test_no_library_calls_a_failing_disk_damage(store, monkeypatch, place, raised):
    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(place, fail)
    report = check(store.root)
    assert not report.ok
    assert report.bad_files == []
    assert report.unreadable == report.problems
    assert all("Input/output error: " in line for line in report.problems)


def test_repair_deletes_nothing_that_could_not_be_read(store, monkeypatch, capsys):
    """Beside a shard that could be read, and is damaged."""
    unreadable, damaged = store.names[:2]
    flip(store.root / damaged, -1)

    def open_but_one(path, spec):
        if path.name == unreadable:
            raise OSError(5, "Input/output error", str(path))
        return open_shard(path, spec)

    monkeypatch.setattr("cache.layout.open_shard", open_but_one)
    with pytest.raises(CorruptShardError) as caught:
        verify(str(store.root), deep=True, repair=True)
    assert "files deleted: 1, not readable: 1, the first: [Errno 5] Input/output" in str(
        caught.value
    )
    assert f"'{store.root / unreadable}'" in str(caught.value)
    assert {path.name for path in store.root.glob("*.h5")} == set(store.names) - {damaged}


def test_a_spec_larger_than_any_is_refused_unread(store):
    path = store.root / "spec.json"
    path.write_bytes(path.read_bytes() + b" " * 2**16)
    report = check(store.root)
    assert "wanted at most 65536" in report.problems[0]
    assert report.bad_files == ["spec.json"]
