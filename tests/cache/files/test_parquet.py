"""Tables of any writer are read; hostile and damaged ones are refused in one line."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.files import parquet
from cache.files.parquet import open_parquet, read_columns
from workspace.errors import StageError

ROOT = Path(__file__).parents[3]

SCHEMA = pa.schema([("image_id", pa.int64()), ("text", pa.string())])

TURNS = pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))

READ = """
import sys, time
import pyarrow as pa
from pathlib import Path
from workspace.errors import StageError
from cache.files.parquet import read_columns
schema = pa.schema([("image_id", pa.int64()), ("text", pa.string())])
for path in sys.argv[1:]:
    started = time.perf_counter()
    try:
        read_columns(Path(path), schema, lambda detail: StageError(f"refused: {detail}"))
        print("read")
    except StageError as error:
        # Not ru_maxrss, which begins with that of the process that started this one.
        peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        print(f"{time.perf_counter() - started} {peak} {error}")
"""


def refuse(detail):
    return StageError(f"table: {detail}")


def table(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    words = np.array(["a", "red", "blue", "cat", "dog", "on", "in", "the", "box", "where"])
    texts = [" ".join(rng.choice(words, 11)) for _ in range(num_rows)]
    return pa.table([pa.array(np.arange(num_rows) * 7), pa.array(texts)], schema=SCHEMA)


OPTIONS = [
    {},
    {"use_dictionary": False},
    {"data_page_version": "2.0"},
    {"data_page_version": "2.0", "use_dictionary": False, "compression": "zstd"},
    {"compression": "none"},
    {"compression": "gzip", "data_page_size": 200},
    {"compression": "brotli", "row_group_size": 100},
    {"compression": "lz4"},
    {"write_page_checksum": True, "write_page_index": True},
    {"store_schema": False, "write_statistics": False},
    {"dictionary_pagesize_limit": 100},
    {"use_dictionary": False, "column_encoding": {"image_id": "DELTA_BINARY_PACKED"}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 1000])
def test_a_table_is_read_whatever_wrote_it(tmp_path, options, num_rows):
    wanted = table(num_rows)
    pq.write_table(wanted, tmp_path / "t", **options)
    assert read_columns(tmp_path / "t", SCHEMA, refuse).equals(wanted)
    with open_parquet(tmp_path / "t", SCHEMA, refuse, read_dictionary=["text"]) as file:
        found = file.read()
    assert found["text"].to_pylist() == wanted["text"].to_pylist()


def test_columns_that_are_not_asked_for_may_be_anything(tmp_path):
    wanted = table(10)
    pq.write_table(wanted.append_column("more", pa.array([None] * 10)), tmp_path / "t")
    assert read_columns(tmp_path / "t", SCHEMA, refuse).equals(wanted)


@pytest.mark.parametrize("kind", ["images", "captions", "conversations", "pope"])
def test_real_tables_stay_far_below_what_a_file_may_unpack_to(tmp_path, monkeypatch, kind):
    """Without the bytes that any file may have; real words repeat less than these."""
    monkeypatch.setattr(parquet, "MIN_BUDGET", 0)
    count = 20_000
    rng = np.random.default_rng(0)
    ids, texts = pa.array(np.sort(rng.choice(10**6, count, False))), table(count)["text"]
    columns = {"image_id": ids, "split": pa.array(["train"] * count)}
    if kind == "images":
        columns |= {
            "file_name": pa.array([f"{n:012}.jpg" for n in ids.to_pylist()]),
            "width": pa.array([640] * count, pa.int32()),
            "num_bytes": pa.array(rng.integers(10**4, 10**6, count)),
            "source_xxh3": pa.array(rng.integers(0, 2**63, count).astype(np.uint64)),
        }
    if kind == "captions":
        columns |= {"caption_id": pa.array(np.arange(count)), "caption": texts}
    if kind == "conversations":
        pair = [{"role": "user", "text": "What is it?"}, {"role": "assistant", "text": "A cat."}]
        turns = [[pair[0], {"role": "assistant", "text": text.as_py()}, *pair] for text in texts]
        columns |= {"turns": pa.array(turns, TURNS)}
    if kind == "pope":
        columns |= {
            "question_id": pa.array([f"random/{n}" for n in range(count)]),
            "question": pa.array([f"Is there a {n % 80}?" for n in range(count)]),
            "label": pa.array(["yes", "no"] * (count // 2)),
        }
    written = pa.table(columns)
    pq.write_table(written, tmp_path / "t", compression="zstd")
    assert read_columns(tmp_path / "t", written.schema, refuse).equals(written)


# Bombs


def varint(number):
    groups = [number >> shift & 127 for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def with_footer(path, schema, row_groups=b"\x19\x0c"):
    """Write a file of a footer alone, by hand, in Thrift's compact protocol."""
    elements = b"\xfc" + varint(len(schema)) + b"".join(schema)
    footer = b"\x15\x02\x19" + elements + b"\x16\x00" + row_groups + b"\x00"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")


def group(children):
    return b"\x35\x02\x18\x01g\x15" + varint(2 * children) + b"\x00"


LEAF = b"\x15\x04\x25\x02\x18\x01l\x00"


def of_one_text(text, count):
    """A column that repeats a text; it takes the memory of one."""
    return pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), pa.array([text]))


def write_bombs(folder):
    def write(name, ids, texts, **options):
        columns = pa.table([pa.array(ids), texts], ["image_id", "text"])
        pq.write_table(columns, folder / name, store_schema=False, compression="zstd", **options)

    many = 3_000_000
    write("a_page", np.zeros(1, np.int64), pa.array(["a" * (65 << 20)]), use_dictionary=False)
    write("a_dictionary", np.zeros(1, np.int64), of_one_text("a" * (65 << 20), 1))
    write("a_repeated_text", np.zeros(many, np.int64), of_one_text("a" * (1 << 20), many))
    write("a_run", np.zeros(4 * many, np.int64), of_one_text("a", 4 * many))
    (folder / "a_footer").write_bytes(bytes(20 << 20) + (17 << 20).to_bytes(4, "little") + b"PAR1")
    with_footer(folder / "a_deep_schema", [group(1)] * 9_000 + [LEAF])
    with_footer(folder / "a_deeper_schema", [group(1)] * 1_000_000 + [LEAF])
    with_footer(folder / "a_wide_schema", [group(100_000)] + [LEAF] * 100_000)
    chunk = b"\x26\x08\x1c\x15\x04\x19\x05\x19\x18\x01l\x15\x00\x16\x02\x16\x02\x16\x02\x26\x08\0\0"
    row_group = b"\x19\xfc" + varint(200) + chunk * 200 + b"\x16\x02\x16\x02\x00"
    row_groups = b"\x19\xfc" + varint(1_500) + row_group * 1_500
    with_footer(folder / "many_row_groups", [group(1), LEAF], row_groups)


def test_a_bomb_is_refused_within_ten_seconds_and_two_gigabytes(tmp_path):
    write_bombs(tmp_path)
    paths = sorted(tmp_path.iterdir())
    assert len(paths) == 9
    done = subprocess.run(
        [sys.executable, "-c", READ, *paths],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        seconds, peak, error = line.split(" ", 2)
        assert error.startswith("refused: "), path.name
        assert float(seconds) < 10, path.name
        assert int(peak) < 2 << 20, path.name


def test_a_text_that_grows_with_every_row_is_refused(tmp_path):
    texts = pa.array(["a" * n for n in range(100)])
    pq.write_table(
        pa.table([pa.array(range(100)), texts], schema=SCHEMA),
        tmp_path / "t",
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
    )
    with pytest.raises(StageError, match="values in the encoding 7"):
        read_columns(tmp_path / "t", SCHEMA, refuse)


# Damage


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False, "compression": "none"}])
def test_a_damaged_table_is_read_or_refused_in_one_line(tmp_path, options):
    path = tmp_path / "t"
    pq.write_table(table(40), path, **options)
    data = path.read_bytes()
    refused = []
    for place in range(0, len(data), 4):
        changed = bytearray(data)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        try:
            read_columns(path, SCHEMA, refuse).to_pylist()
        except StageError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert not [text for text in refused if "\n" in text]


def test_a_damaged_footer_of_nested_columns_never_ends_the_process(tmp_path):
    # Arrow aborts the process when it is asked for a column chunk with such damage.
    schema, path = pa.schema([("turns", TURNS)]), tmp_path / "t"
    turns = pa.array([[{"role": "user", "text": "What?"}]], TURNS)
    pq.write_table(pa.table([turns], schema=schema), path, store_schema=False)
    data = path.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    refused = 0
    for place in range(len(data) - 8 - length, len(data) - 8):
        changed = bytearray(data)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        try:
            read_columns(path, schema, refuse)
        except StageError:
            refused += 1
    assert refused > length / 4


def test_a_footer_of_too_many_column_chunks_is_refused(tmp_path, monkeypatch):
    pq.write_table(table(40), tmp_path / "t", row_group_size=10)
    monkeypatch.setattr(parquet, "MAX_CHUNKS", 7)
    with pytest.raises(StageError, match="more than 7 column chunks"):
        read_columns(tmp_path / "t", SCHEMA, refuse)


def test_nulls_are_refused_at_any_depth(tmp_path):
    schema = pa.schema([("turns", TURNS)])
    for turns in ([None], [[None]], [[{"role": "user", "text": None}]]):
        pq.write_table(pa.table([pa.array(turns, TURNS)], schema=schema), tmp_path / "t")
        with pytest.raises(StageError, match="it has nulls"):
            read_columns(tmp_path / "t", schema, refuse)


def test_text_that_is_no_text_is_refused(tmp_path):
    texts = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table([pa.array([1]), texts], schema=SCHEMA), tmp_path / "t")
    with pytest.raises(StageError, match="UTF8"):
        read_columns(tmp_path / "t", SCHEMA, refuse)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: None])
def test_a_pipe_a_folder_and_a_device_are_refused_without_waiting(tmp_path, make):
    make(tmp_path / "t")
    with pytest.raises(
        StageError, match=r"table: (a pipe, a socket or a device|.*Is a directory|.*No such file)"
    ):
        read_columns(tmp_path / "t", SCHEMA, refuse)


def test_a_failure_of_the_system_names_the_file_and_is_no_damage(tmp_path, monkeypatch):
    pq.write_table(table(1), tmp_path / "t")

    def fail(*arguments, **options):
        raise OSError(5, "Error reading bytes from file")

    monkeypatch.setattr(pq.ParquetFile, "read", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*/t'") as caught:
        read_columns(tmp_path / "t", SCHEMA, refuse)
    assert not isinstance(caught.value, StageError)
