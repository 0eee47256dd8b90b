import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.indexing.captions import read_captions
from pipeline.indexing.instruct import read_instruct
from pipeline.indexing.pope import read_question_files
from pipeline.indexing.texts import entries
from workspace.errors import StageError

ROWS = [{"image": f"a/{n}.jpg", "caption": f"caption {n}"} for n in range(5)]
HEADER = "image,caption\n"


def captions_of(path):
    return [(c.caption_id, c.image, c.caption) for c in read_captions(path, key="k").captions]


def conversations_of(path):
    return read_instruct([path], [], read_question_files([]), 0).conversations


def write_table(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path):
    with pytest.raises(StageError) as error:
        read_captions(path, key="k")
    assert str(error.value).startswith(f"k: {path}: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_table_is_the_same_in_every_form(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    table = "".join(f"{row['image']}\t{row['caption']}\n" for row in ROWS)
    paths = [
        write(tmp_path / "t.tsv", "image\tcaption\n" + table),
        write(tmp_path / "t.txt", "image\tcaption\n" + table),
        write(tmp_path / "t.jsonl", lines),
        write(tmp_path / "t.json", lines),
        write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + lines.encode()),
        write(tmp_path / "list.json", json.dumps(ROWS)),
        write_table(tmp_path / "t.parquet", ROWS),
        write_table(tmp_path / "groups.parquet", ROWS, row_group_size=2),
        write_table(tmp_path / "no_suffix", ROWS),
    ]
    wanted = [(n, row["image"], row["caption"]) for n, row in enumerate(ROWS)]
    for path in paths:
        assert captions_of(path) == wanted, path.name


def test_rows_of_parquet_are_counted_over_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(entries, "BATCH_ROWS", 2)
    path = write_table(tmp_path / "t.parquet", [*ROWS, {"image": "b.jpg", "caption": None}])
    file = read_captions(path, key="k")
    assert [image.record for image in file.images] == [f"t.parquet: row {n}" for n in range(6)]
    assert [(bad.record, bad.reason) for bad in file.rejected] == [
        ("t.parquet: row 5", "key 'caption' is not str: NoneType")
    ]


def test_names_in_a_dictionary_are_names(tmp_path):
    images = pa.array([row["image"] for row in ROWS]).dictionary_encode()
    table = pa.table({"image": images, "text": [row["caption"] for row in ROWS]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert len(captions_of(tmp_path / "t.parquet")) == 5


def test_a_table_that_unpacks_to_too_much_is_refused_unread(tmp_path):
    table = pa.table({"image": ["a.jpg"] * 4000, "caption": ["x" * (1 << 17)] * 4000})
    pq.write_table(table, tmp_path / "t.parquet", compression="zstd")
    assert (tmp_path / "t.parquet").stat().st_size < 10_000
    assert "it unpacks to more than 256 MiB" in refused(tmp_path / "t.parquet")


def test_parquet_holds_conversations_too(tmp_path):
    said = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]
    path = write_table(tmp_path / "t.parquet", [{"id": 3, "image": "1.jpg", "conversations": said}])
    (found,) = conversations_of(path)
    assert (found.conversation_id, found.image_name) == ("3", "1.jpg")
    rows = [{"image": "1.jpg", "question": "Who?", "answer": "Me."}]
    assert conversations_of(write_table(tmp_path / "q.parquet", rows))[0].turns == found.turns


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (gzip.compress(HEADER.encode(), mtime=0), "compressed with gzip; unpack it"),
        (b"PK\x03\x04abc", "an Excel workbook"),
        (HEADER.encode("utf-16"), "UTF-16 text; save it in UTF-8"),
        (b"PAR1abc", "not usable parquet"),
        (b'{"image": "a.jpg", "caption": "\xe9"}\n', "not UTF-8: byte 0xe9 in line 1"),
        (b'{"image": "a.jpg", "title": "x"}\n', "no column 'caption' or 'text'; it has 'image'"),
        (b"3\n4\n", "no object among its first records (file.jsonl: line 1: int)"),
        (b'{"image"\n{', "no object among its first records (file.jsonl: line 1: not usable JSON"),
        (b"", "it holds no record"),
        (b"[]", "it holds no record"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_reason(tmp_path, content, reason):
    assert reason in refused(write(tmp_path / "file.jsonl", content))


def test_a_json_value_that_holds_no_records_is_refused(tmp_path):
    assert "neither an object nor a list" in refused(write(tmp_path / "f.json", "3"))


def test_columns_that_parquet_lacks_are_named(tmp_path):
    path = write_table(tmp_path / "t.parquet", [{"file": "a.jpg", "label": 3}])
    assert "no column 'image' or 'file_name' and 'caption' or 'text'" in refused(path)
    path = write_table(tmp_path / "i.parquet", [{"image": {"url": "x"}, "caption": "a"}])
    assert "column 'image' holds struct<url: string>, wanted file names" in refused(path)


def test_the_layout_is_told_by_any_of_the_first_records(tmp_path):
    lines = ["3", "{", '{"image": "a.jpg"}', json.dumps(ROWS[0])]
    path = write(tmp_path / "t.jsonl", "\n".join(lines))
    assert captions_of(path) == [(3, "a/0.jpg", "caption 0")]


def test_a_compact_and_a_long_json_object_are_read_as_a_whole(tmp_path):
    value = {
        "images": [{"id": 1, "file_name": "1.jpg"}],
        "annotations": [{"id": 5, "image_id": 1, "caption": "a"}],
    }
    for indent in (None, 2):
        for end in ("", "\n\n"):
            path = write(tmp_path / "c.json", json.dumps(value, indent=indent) + end)
            assert captions_of(path) == [(5, 1, "a")]
