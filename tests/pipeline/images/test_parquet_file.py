"""Images in a parquet table: names, lazy reading by row group, and refusals before reading."""

import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.files import parquet as limits
from pipeline.images import names as names_module
from pipeline.images import parquet_file as module
from pipeline.images.byte_file import LocalFile
from pipeline.images.names import ImageNameError
from pipeline.images.parquet_file import GroupCache, ImageParquet, PackedTable
from tests.pipeline.images.packing import write_parquet
from workspace.errors import StageError

ROWS = [(f"{'d/' * (n % 2)}{n}.jpg", bytes([n]) * n) for n in range(10)]


def opened(path, cache=None):
    return ImageParquet(LocalFile(path), key="data.train.images", cache=cache or GroupCache())


def refusal(path):
    with pytest.raises(StageError, match=r"^data\.train\.images: .* table|parquet") as error:
        opened(path)
    return str(error.value)


@pytest.fixture
def table(tmp_path):
    return write_parquet(tmp_path / "t.parquet", ROWS, row_group_size=3)


@pytest.fixture
def read_groups(monkeypatch):
    """The row groups whose bytes are read, in order."""
    groups = []
    real = PackedTable.read

    def read(self, path, group, *rest):
        if path.endswith("bytes"):
            groups.append(group)
        return real(self, path, group, *rest)

    monkeypatch.setattr(PackedTable, "read", read)
    return groups


def test_rows_are_named_by_their_paths_and_read_alike(table):
    images = opened(table)
    assert images.all_names() == [path for path, _ in ROWS]
    assert {name: images.read(name) for name in images.all_names()} == dict(ROWS)
    assert images.names("3.jpg") == ["d/3.jpg"]
    assert not images.has("3.jpg")
    assert images.real_path("d/3.jpg") == f"{table}/d/3.jpg"


def test_rows_without_a_path_of_their_own_are_named_by_number(tmp_path):
    paths = ["a.jpg", "b.jpg", "b.jpg", None, "", "/x/../y.jpg", "a\\b", "1", ".."]
    rows = [(path, bytes([n])) for n, path in enumerate(paths)]
    images = opened(write_parquet(tmp_path / "t.parquet", rows))
    wanted = ["a.jpg", "1", "2", "3", "4", "x/y.jpg", "6", "7", "8"]
    assert images.all_names() == wanted
    assert [images.read(name) for name in wanted] == [data for _, data in rows]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_column_of_bytes_is_named_by_number(tmp_path, kind):
    pq.write_table(pa.table({"image": pa.array([b"a", b"b"], kind)}), tmp_path / "t.parquet")
    images = opened(tmp_path / "t.parquet")
    assert [images.read(name) for name in images.all_names()] == [b"a", b"b"]
    assert images.all_names() == ["0", "1"]


def test_structs_of_other_binary_types_and_the_only_column_of_another_name_are_read(tmp_path):
    kind = pa.struct({"path": pa.large_string(), "bytes": pa.large_binary()})
    column = pa.array([{"bytes": b"a", "path": "a.jpg"}], kind)
    pq.write_table(pa.table({"n": [1], "picture": column}), tmp_path / "t.parquet")
    assert opened(tmp_path / "t.parquet").read("a.jpg") == b"a"
    kind = pa.struct({"bytes": pa.binary()})
    pq.write_table(pa.table({"image": pa.array([{"bytes": b"a"}], kind)}), tmp_path / "u.parquet")
    assert opened(tmp_path / "u.parquet").read("0") == b"a"


@pytest.mark.parametrize("columns", [{"n": [1]}, {"a": [b"a"], "b": [b"b"]}, {"image": ["a.jpg"]}])
def test_an_unclear_column_of_images_is_refused_with_the_columns(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert "its columns are" in refusal(tmp_path / "t.parquet")


def test_reading_in_order_reads_each_row_group_once(table, read_groups, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 0)
    images = opened(table)
    assert read_groups == []
    for name in images.all_names():
        images.read(name)
    assert read_groups == [0, 1, 2, 3]


def test_groups_are_held_up_to_a_number_of_bytes_over_all_tables(
    tmp_path, read_groups, monkeypatch
):
    rows = [(f"{n}.jpg", bytes(1000)) for n in range(4)]
    cache = GroupCache()
    tables = [
        opened(write_parquet(tmp_path / name, rows, row_group_size=1), cache) for name in "ab"
    ]
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 3500)
    for images in tables:
        for _ in range(2):
            for name in ("0.jpg", "1.jpg"):
                images.read(name)
    # Four groups do not fit: only those of the newest table and one more do.
    assert read_groups == [0, 1, 0, 1]
    tables[0].read("1.jpg")
    assert read_groups == [0, 1, 0, 1]
    tables[0].read("0.jpg")
    assert read_groups == [0, 1, 0, 1, 0]


def test_the_group_that_was_read_longest_ago_goes_first(tmp_path, read_groups, monkeypatch):
    rows = [(f"{n}.jpg", bytes(1000)) for n in range(3)]
    images = opened(write_parquet(tmp_path / "t", rows, row_group_size=1))
    monkeypatch.setattr(module, "MAX_CACHED_BYTES", 2500)
    for number in (0, 1, 0, 2, 0, 1):
        images.read(f"{number}.jpg")
    assert read_groups == [0, 1, 2, 1]


def test_rows_without_bytes_are_errors_of_the_name(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    column = pa.array([None, {"bytes": None, "path": "b.jpg"}, {"bytes": b"c"}], kind)
    pq.write_table(pa.table({"image": column}), tmp_path / "t.parquet")
    images = opened(tmp_path / "t.parquet")
    assert images.all_names() == ["0", "b.jpg", "2"]
    for name in ("0", "b.jpg"):
        with pytest.raises(ImageNameError, match=f"'{name}' in .* holds no bytes"):
            images.read(name)
    assert images.read("2") == b"c"


def test_an_empty_table_is_refused(tmp_path):
    assert "is an empty table" in refusal(write_parquet(tmp_path / "t.parquet", []))


def test_a_huge_image_is_refused(table, monkeypatch):
    images = opened(table)
    monkeypatch.setattr(names_module, "MAX_IMAGE_BYTES", 5)
    with pytest.raises(ImageNameError, match="has more than 5 bytes"):
        images.read("6.jpg")


def test_a_row_group_that_unpacks_to_too_much_is_refused_unread(tmp_path, monkeypatch):
    rows = [("a.jpg", b"a"), ("b.jpg", bytes(1 << 20))]
    path = write_parquet(tmp_path / "t.parquet", rows, row_group_size=1, compression="zstd")
    images = opened(path)
    monkeypatch.setattr(module, "MIN_BUDGET", 1 << 16)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", None)
    with pytest.raises(ImageNameError, match=r"'b\.jpg' in .* is damaged: it unpacks to more than"):
        images.read("b.jpg")


def test_a_row_group_of_too_many_bytes_names_the_remedy(table, monkeypatch):
    images = opened(table)
    monkeypatch.setattr(module, "MAX_GROUP_BYTES", 10)
    with pytest.raises(ImageNameError, match="wanted at most 10; write it with row_group_size=100"):
        images.read("d/9.jpg")


def test_more_rows_than_bytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MIN_ROWS", 100)
    rows = pa.array([None] * 100_000, pa.binary())
    pq.write_table(pa.table({"image": rows}), tmp_path / "t.parquet")
    assert "100000 rows in" in refusal(tmp_path / "t.parquet")


def test_a_huge_footer_is_refused_unparsed(table, monkeypatch):
    monkeypatch.setattr(limits, "MAX_FOOTER_BYTES", 10)
    monkeypatch.setattr(pq, "ParquetFile", None)
    assert "its footer has" in refusal(table)


def test_a_pickled_table_holds_no_row_group_and_reads_no_name_again(table, read_groups):
    images = opened(table)
    images.read("0.jpg")
    images.names("0.jpg")
    copy = pickle.loads(pickle.dumps(images))
    assert copy.read("0.jpg") == b""
    assert copy.names("3.jpg") == ["d/3.jpg"]
    assert read_groups == [0, 0]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_damaged_tables_raise_only_named_errors(tmp_path, compression):
    dice = random.Random(compression)
    path = tmp_path / "t.parquet"
    write_parquet(path, ROWS, row_group_size=5, compression=compression)
    whole, failures = path.read_bytes(), 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(3):
            data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data)
        try:
            images = opened(path)
            for name in images.all_names():
                images.read(name)
        except (ImageNameError, StageError):
            failures += 1
    assert failures > 100


def test_a_cut_table_is_refused(table):
    whole = table.read_bytes()
    for size in range(0, len(whole), 97):
        table.write_bytes(whole[:size])
        assert "no readable parquet file of images" in refusal(table)


@pytest.mark.parametrize("names", [("image", "image"), ("image", "image.path")])
def test_names_of_columns_that_mean_two_are_refused(tmp_path, names):
    images = pa.array([{"bytes": b"x", "path": "a.png"}])
    other = images if names[0] == names[1] else pa.array(["b.png"])
    pq.write_table(pa.Table.from_arrays([images, other], names), tmp_path / "t.parquet")
    with pytest.raises(StageError, match=r"two columns are called|can mean a part of another"):
        PackedTable(LocalFile(tmp_path / "t.parquet"), key="k")
