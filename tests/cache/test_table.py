import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.errors import IncompleteStoreError
from cache.table import SCHEMA, ShardFile, StoreTable

NAMES = ["00000000000000aa.h5", "00000000000000bb.h5", "00000000000000cc.h5"]


@pytest.fixture
def table():
    return StoreTable(
        fingerprint="ab" * 32,
        shards=tuple(ShardFile(name, 100 + n, f"{n}" * 64) for n, name in enumerate(NAMES)),
        image_ids=np.array([-5, 0, 7, 9, 2**62]),
        shard_number=np.array([2, 2, 0, 0, 1], np.int32),
        row=np.array([0, 1, 0, 1, 0], np.int32),
        row_xxh3=np.array([0, 1, 2**63, 2**64 - 1, 5], np.uint64),
        source_xxh3=np.array([2**64 - 1, 4, 3, 2, 1], np.uint64),
    )


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
    for field in dataclasses.fields(StoreTable):
        ours, theirs = getattr(wanted, field.name), getattr(found, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
        else:
            assert ours == theirs


def test_a_round_trip_keeps_everything(written, table):
    assert_equal(StoreTable.read(written), table)


def test_two_writes_are_equal_byte_by_byte(written, table, tmp_path):
    table.write(tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == written.read_bytes()
    StoreTable.read(written).write(tmp_path / "third.parquet")
    assert (tmp_path / "third.parquet").read_bytes() == written.read_bytes()


def test_it_is_the_parquet_of_the_design(written):
    found = pq.read_table(written)
    assert found.schema.remove_metadata() == SCHEMA
    assert found.column_names == ["image_id", "shard", "row", "row_xxh3", "source_xxh3"]
    assert found["shard"].to_pylist() == [NAMES[n] for n in (2, 2, 0, 0, 1)]
    assert found.schema.metadata[b"fingerprint"] == b"ab" * 32
    shards = json.loads(found.schema.metadata[b"shards"])
    assert shards == {
        name: {"bytes": 100 + n, "sha256": f"{n}" * 64} for n, name in enumerate(NAMES)
    }


@pytest.mark.parametrize("size", [1, 2])
def test_row_groups_do_not_matter(written, table, size):
    pq.write_table(pq.read_table(written), written, row_group_size=size)
    assert_equal(StoreTable.read(written), table)


def test_an_empty_table_survives(tmp_path, table):
    empty = {
        field.name: getattr(table, field.name)[:0]
        for field in dataclasses.fields(table)
        if isinstance(getattr(table, field.name), np.ndarray)
    }
    empty_table = dataclasses.replace(table, shards=(), **empty)
    empty_table.write(tmp_path / "empty.parquet")
    assert_equal(StoreTable.read(tmp_path / "empty.parquet"), empty_table)


def test_a_folder_named_like_a_partition_adds_no_column(tmp_path, table):
    (tmp_path / "lr=5").mkdir()
    table.write(tmp_path / "lr=5" / "index.parquet")
    assert_equal(StoreTable.read(tmp_path / "lr=5" / "index.parquet"), table)


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
def test_a_shard_name_that_no_writer_makes_is_refused(written, table, name):
    shards = {name: {"bytes": 1, "sha256": "a"} for name in [*NAMES, name]}
    rewrite(written, shards=json.dumps(shards).encode())
    with pytest.raises(IncompleteStoreError, match="it names a shard"):
        StoreTable.read(written)


def test_a_row_in_a_shard_without_size_is_refused(written):
    def elsewhere(table):
        return table.set_column(1, "shard", pa.array(["../x.h5"] * len(table)))

    rewrite(written, elsewhere)
    with pytest.raises(IncompleteStoreError, match="without size and hash"):
        StoreTable.read(written)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_nulls_are_refused(written, column):
    def blank(table):
        place = table.column_names.index(column)
        values = [None, *table[column].to_pylist()[1:]]
        return table.set_column(
            place, SCHEMA.field(column), pa.array(values, SCHEMA.field(column).type)
        )

    rewrite(written, blank)
    with pytest.raises(IncompleteStoreError, match="nulls"):
        StoreTable.read(written)


@pytest.mark.parametrize("order", [[1, 0, 2, 3, 4], [0, 0, 2, 3, 4]])
def test_ids_that_do_not_ascend_are_refused(written, order):
    rewrite(written, lambda table: table.take(order))
    with pytest.raises(IncompleteStoreError, match="do not ascend"):
        StoreTable.read(written)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_column_of_another_type_is_refused(written, column):
    def retype(table):
        place = table.column_names.index(column)
        return table.set_column(place, column, pa.array([1.5] * len(table)))

    rewrite(written, retype)
    with pytest.raises(IncompleteStoreError, match="its columns are"):
        StoreTable.read(written)


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_column_too_few_is_refused(written, column):
    rewrite(written, lambda table: table.drop_columns([column]))
    with pytest.raises(IncompleteStoreError, match=r"index.parquet: "):
        StoreTable.read(written)


def test_a_column_too_many_is_refused(written):
    rewrite(written, lambda table: table.append_column("more", table["row"]))
    with pytest.raises(IncompleteStoreError, match="more"):
        StoreTable.read(written)


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
        {"shards": b"{}"},
    ],
)
def test_metadata_that_no_writer_makes_are_refused(written, metadata):
    rewrite(written, **metadata)
    with pytest.raises(IncompleteStoreError, match=r"metadata lack|without size"):
        StoreTable.read(written)


def test_a_table_without_any_metadata_is_refused(written):
    pq.write_table(pq.read_table(written).replace_schema_metadata(None), written)
    with pytest.raises(IncompleteStoreError, match="metadata lack"):
        StoreTable.read(written)


def test_what_is_no_parquet_is_refused(written):
    data = written.read_bytes()
    contents = [b"", b"PAR1", b"x" * 1000, *(data[: len(data) * n // 10] for n in range(10))]
    for content in contents:
        written.write_bytes(content)
        with pytest.raises(IncompleteStoreError, match="not a parquet file"):
            StoreTable.read(written)


def test_a_missing_table_says_what_to_do(tmp_path):
    with pytest.raises(IncompleteStoreError, match=r"not a finished store.*dvc pull"):
        StoreTable.read(tmp_path / "index.parquet")
    (tmp_path / "index.parquet").mkdir()
    with pytest.raises(IncompleteStoreError):
        StoreTable.read(tmp_path / "index.parquet")
