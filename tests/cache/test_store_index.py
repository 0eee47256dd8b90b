import dataclasses
import hashlib
import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.errors import CorruptShardError, IncompleteStoreError, PatchcacheError, SpecMismatchError
from cache.store_index import SCHEMA, ShardFile, StoreIndex, check_own_hash

NAMES = ["00000000000000aa.h5", "00000000000000bb.h5", "00000000000000cc.h5"]


@pytest.fixture
def table(spec):
    return StoreIndex(
        fingerprint=spec.fingerprint,
        shards=tuple(ShardFile(name, 100 + n, f"{n}" * 64) for n, name in enumerate(NAMES)),
        image_ids=np.array([-5, 0, 7, 9, 2**62]),
        shard_number=np.array([2, 2, 0, 0, 1], np.int32),
        row=np.array([0, 1, 0, 1, 0], np.int32),
        row_xxh3=np.array([0, 1, 2**63, 2**64 - 1, 5], np.uint64),
        source_xxh3=np.array([2**64 - 1, 4, 3, 2, 1], np.uint64),
    )


@pytest.fixture
def read(spec):
    return lambda path: StoreIndex.read(path, spec)


@pytest.fixture
def written(tmp_path, table):
    table.write(tmp_path / "index.parquet")
    return tmp_path / "index.parquet"


def rewrite(path, change=lambda table: table, **metadata):
    """Change the columns or the metadata of a written table."""
    found = pq.read_table(path)
    new = found.schema.metadata | {name.encode(): value for name, value in metadata.items()}
    new = {name: value for name, value in new.items() if value is not None}
    pq.write_table(change(found).replace_schema_metadata(new), path)


def assert_equal(found, wanted):
    for field in dataclasses.fields(StoreIndex):
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
        else:
            assert ours == theirs


def test_a_round_trip_keeps_everything(written, table, read):
    assert_equal(read(written), table)


def test_two_writes_are_equal_byte_by_byte(written, table, tmp_path, read):
    table.write(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == written.read_bytes()
    read(written).write(tmp_path / "third.parquet")
    assert (tmp_path / "third.parquet").read_bytes() == written.read_bytes()


def test_it_is_the_parquet_of_the_design(written, table):
    found = pq.read_table(written)
    assert found.schema.remove_metadata() == SCHEMA
    assert found.column_names == ["image_id", "shard", "row", "row_xxh3", "source_xxh3"]
    assert found["shard"].to_pylist() == [NAMES[n] for n in (2, 2, 0, 0, 1)]
    assert found.schema.metadata[b"fingerprint"] == table.fingerprint.encode()
    shards = json.loads(found.schema.metadata[b"shards"])
    assert shards == {
        name: {"bytes": 100 + n, "sha256": f"{n}" * 64} for n, name in enumerate(NAMES)
    }


@pytest.mark.parametrize("size", [1, 2])
def test_row_groups_do_not_matter(written, table, size, read):
    pq.write_table(pq.read_table(written), written, row_group_size=size)
    assert_equal(read(written), table)


def test_an_empty_table_survives(tmp_path, table, read):
    empty = {
        field.name: getattr(table, field.name)[:0]
        for field in dataclasses.fields(table)
        if isinstance(getattr(table, field.name), np.ndarray)
    }
    empty_table = dataclasses.replace(table, shards=(), **empty)
    empty_table.write(tmp_path / "empty.parquet")
    assert_equal(read(tmp_path / "empty.parquet"), empty_table)


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path, table, read):
    (tmp_path / "lr=5").mkdir()
    table.write(tmp_path / "lr=5" / "index.parquet")
    assert_equal(read(tmp_path / "lr=5" / "index.parquet"), table)


@pytest.mark.parametrize(
    "name",
    [
        "../00000000000000aa.h5",
        "/00000000000000aa.h5",
        "/etc/passwd",
        "sub/00000000000000aa.h5",
        "00000000000000aa.h5\n",
        "00000000000000AA.h5",
        "00000000000000aa.hdf5",
        "0000000000000aa.h5",
        "http://evil/00000000000000aa.h5",
        "",
    ],
)
def test_a_shard_name_that_no_writer_makes_is_refused(written, table, name, read):
    shards = {name: {"bytes": 1, "sha256": "a"} for name in [*NAMES, name]}
    rewrite(written, shards=json.dumps(shards).encode())
    with pytest.raises(IncompleteStoreError, match="it names a shard"):
        read(written)


def test_a_row_in_a_shard_without_size_is_refused(written, read):
    def elsewhere(table):
        return table.set_column(1, "shard", pa.array(["../x.h5"] * len(table)))

    rewrite(written, elsewhere)
    with pytest.raises(IncompleteStoreError, match="without size and hash"):
        read(written)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_nulls_are_refused(written, column, read):
    def blank(table):
        place = table.column_names.index(column)
        values = [None, *table[column].to_pylist()[1:]]
        return table.set_column(
            place, SCHEMA.field(column), pa.array(values, SCHEMA.field(column).type)
        )

    rewrite(written, blank)
    with pytest.raises(IncompleteStoreError, match="nulls"):
        read(written)


@pytest.mark.parametrize("order", [[1, 0, 2, 3, 4], [0, 0, 2, 3, 4]])
def test_ids_that_do_not_ascend_are_refused(written, order, read):
    rewrite(written, lambda table: table.take(order))
    with pytest.raises(CorruptShardError, match="must ascend"):
        read(written)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_column_of_another_type_is_refused(written, column, read):
    def retype(table):
        place = table.column_names.index(column)
        return table.set_column(place, column, pa.array([1.5] * len(table)))

    rewrite(written, retype)
    with pytest.raises(IncompleteStoreError, match="its columns are"):
        read(written)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_column_too_few_is_refused(written, column, read):
    rewrite(written, lambda table: table.drop_columns([column]))
    with pytest.raises(IncompleteStoreError, match=r"index.parquet: "):
        read(written)


def test_a_column_too_many_is_refused(written, read):
    rewrite(written, lambda table: table.append_column("more", table["row"]))
    with pytest.raises(IncompleteStoreError, match="more"):
        read(written)


@pytest.mark.parametrize(
    "metadata",
    [
        {"fingerprint": None},
        {"shards": None},
        {"fingerprint": b"\xff"},
        {"shards": b""},
        {"shards": b"[]"},
        {"shards": b"5"},
        {"shards": b"[" * 100_000},
        {"shards": b'{"00000000000000aa.h5": 5}'},
        {"shards": b'{"00000000000000aa.h5": {"bytes": 1}}'},
        {"shards": b'{"00000000000000aa.h5": {"bytes": "x", "sha256": "a"}}'},
        {"shards": b'{"00000000000000aa.h5": {"bytes": 1e999, "sha256": "a"}}'},
        {"shards": b'{"00000000000000aa.h5": {"bytes": NaN, "sha256": "a"}}'},
    ],
)
def test_metadata_that_no_writer_makes_are_refused(written, metadata, read):
    rewrite(written, **metadata)
    with pytest.raises(IncompleteStoreError, match="metadata lack"):
        read(written)


def test_a_table_without_any_metadata_is_refused(written, read):
    pq.write_table(pq.read_table(written).replace_schema_metadata(None), written)
    with pytest.raises(IncompleteStoreError, match="metadata lack"):
        read(written)


def test_a_file_that_is_not_parquet_is_refused(written, read):
    data = written.read_bytes()
    contents = [b"", b"PAR1", b"x" * 1000, *(data[: len(data) * n // 10] for n in range(10))]
    for content in contents:
        written.write_bytes(content)
        with pytest.raises(IncompleteStoreError, match="not a parquet file"):
            read(written)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, read):
    with pytest.raises(IncompleteStoreError, match="not a parquet file"):
        read(tmp_path / "index.parquet")
    (tmp_path / "index.parquet").mkdir()
    with pytest.raises(IncompleteStoreError, match="not a parquet file"):
        read(tmp_path / "index.parquet")


def test_the_table_of_another_encoder_is_refused(written, spec):
    other = dataclasses.replace(spec, layer=-1)
    with pytest.raises(SpecMismatchError, match=r"index\.parquet: is of the encoder"):
        StoreIndex.read(written, other)


@pytest.mark.parametrize("shards", [NAMES[:2], []])
def test_more_rows_than_the_shards_can_hold_are_refused_before_they_are_read(
    written, read, monkeypatch, shards
):
    sizes = {name: {"bytes": 119, "sha256": "a"} for name in shards}
    rewrite(written, shards=json.dumps(sizes).encode())
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    with pytest.raises(CorruptShardError, match="has 5 rows of 48 bytes of features, more than"):
        read(written)


@pytest.mark.parametrize(
    "rows", [[-1, 1, 0, 1, 0], [0, 1, 0, 2, 0], [0, 0, 0, 1, 0], [1, 2, 0, 1, 0]]
)
def test_rows_of_a_shard_that_do_not_count_from_zero_are_refused(written, read, rows):
    column = pa.array(rows, pa.int32())
    rewrite(written, lambda table: table.set_column(2, "row", column))
    with pytest.raises(CorruptShardError, match=r"are not 0, 1, 2, \.\.\."):
        read(written)


def test_an_image_that_two_shards_claim_names_both(written, read):
    column = pa.array([-5, 0, 0, 9, 2**62], pa.int64())
    rewrite(written, lambda table: table.set_column(0, "image_id", column))
    with pytest.raises(CorruptShardError, match=f"{NAMES[2]} and {NAMES[0]}"):
        read(written)


def varint(number):
    zigzag = (number << 1) ^ (number >> 63)
    groups = [zigzag >> shift & 127 for shift in range(0, max(1, zigzag.bit_length()), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def forge_num_rows(path, count, everywhere):
    """Make the footer, or the footer and its row group, claim another number of rows."""
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - length
    before, footer = data[:start], data[start:-8]
    # Thrift: a field header, then the number.
    old, new = b"\x16" + varint(5), b"\x16" + varint(count)
    assert old in footer
    footer = footer.replace(old, new, -1 if everywhere else 1)
    path.write_bytes(before + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    assert pq.read_metadata(path).num_rows == count


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("count", [-1, 0, 4, 6, 60])
def test_a_footer_that_lies_about_the_rows_is_refused(written, read, count, everywhere):
    sizes = {name: {"bytes": 10**6, "sha256": "a"} for name in NAMES}
    rewrite(written, shards=json.dumps(sizes).encode())
    forge_num_rows(written, count, everywhere)
    if everywhere and 0 <= count < 5:
        # Rows that nothing claims are not read.
        assert len(read(written).image_ids) == count
        return
    with pytest.raises(IncompleteStoreError, match=f"footer.* {count} rows|the {count} rows"):
        read(written)


def test_more_rows_than_memory_can_hold_are_refused(written, read):
    sizes = {name: {"bytes": 2**62, "sha256": "a"} for name in NAMES}
    rewrite(written, shards=json.dumps(sizes).encode())
    forge_num_rows(written, 2**50, everywhere=False)
    with pytest.raises(IncompleteStoreError, match="it unpacks to more than 256 MiB"):
        read(written)


def test_an_error_of_the_callers_check_passes_unchanged(written, read, spec):
    def missing(file):
        raise IncompleteStoreError("no such shard")

    with pytest.raises(IncompleteStoreError, match=r"^no such shard$"):
        StoreIndex.read(written, spec, missing)
    rewrite(written, shards=None)
    with pytest.raises(IncompleteStoreError, match=r"index\.parquet: its metadata lack"):
        read(written)


# The hash that an index carries of itself


def test_a_written_table_carries_its_own_hash(written):
    check_own_hash(written)
    data = written.read_bytes()
    stated = pq.read_metadata(written).metadata[b"file_sha256"]
    assert data.count(stated) == 1
    assert hashlib.sha256(data.replace(stated, b"0" * 64)).hexdigest().encode() == stated


def test_a_large_file_is_hashed_without_taking_memory(written):
    os.truncate(written, 1 << 26)
    tracemalloc.start()
    with pytest.raises(CorruptShardError, match="its sha256 is"):
        check_own_hash(written)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_every_flipped_bit_is_found(written, read):
    data = written.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        written.write_bytes(changed)
        with pytest.raises(PatchcacheError):  # noqa: PT012
            check_own_hash(written)
            read(written)


def test_a_table_that_was_written_elsewhere_needs_no_hash(written, table, read):
    rewrite(written, file_sha256=None)
    check_own_hash(written)
    assert_equal(read(written), table)
