"""Captions beside their images: every text belongs to an image of its sample, or is rejected."""

import gzip
import json
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.images.archives import ImageArchive
from pipeline.indexing.captions import read_captions
from pipeline.indexing.texts import packed as module
from pipeline.indexing.texts.packed import is_packed, read_packed_captions
from tests.pipeline.images.packing import write_parquet, write_tar
from tests.pipeline.images.range_server import RangeServer
from workspace.data_settings import ImagePath
from workspace.errors import StageError

KEY = "data.train.captions"


def as_json(**fields):
    return json.dumps(fields).encode()


def read(path):
    return read_packed_captions(str(path), KEY)


def pairs(found):
    """Image and caption of each record."""
    return [(record.image, record.caption) for record in found.captions]


def reasons(found):
    return {(r.kind, r.record, r.reason_class) for r in found.rejected}


def names(found):
    return [record.file_name for record in found.images]


def test_a_sample_is_an_image_and_the_text_of_the_same_key(tmp_path):
    files = {
        "000.jpg": b"0",
        "000.txt": " A  cat\n".encode("utf-8-sig"),
        "000.json": as_json(caption="not this one"),
        "deep/001.PNG": b"1",
        "deep/001.json": as_json(caption="a dog", text="not this one"),
        "002.json": as_json(text="a cow", width=3),
        "002.webp": b"2",
        "003.jpg": b"3",
        "003.json": as_json(caption=["one", "two"]),
        "003.cls": b"7",
        "004.jpg": b"4",
    }
    found = read(write_tar(tmp_path / "00012.tar", files))
    assert pairs(found) == [
        ("00012/000.jpg", "A cat"),
        ("00012/deep/001.PNG", "a dog"),
        ("00012/002.webp", "a cow"),
        ("00012/003.jpg", "one"),
        ("00012/003.jpg", "two"),
    ]
    assert [record.caption_id for record in found.captions] == [0, 1, 2, 3, 4]
    assert names(found)[-1] == "00012/004.jpg"
    assert all(record.image_id is None for record in found.images)
    assert found.rejected == []
    assert (found.num_images, found.num_captions) == (5, 5)
    assert found.captions[0].record == "00012.tar: 000.txt"
    assert found.images[0].record == "00012.tar: 000.jpg"


def test_nothing_is_left_out_in_silence(tmp_path):
    files = [
        ("only.txt", b"no picture"),
        ("empty.jpg", b""),
        ("empty.txt", b"  \n"),
        ("bytes.jpg", b""),
        ("bytes.txt", b"\xff"),
        ("none.jpg", b""),
        ("none.json", as_json(width=3)),
        ("list.jpg", b""),
        ("list.json", as_json(caption=["a", 3])),
        ("broken.jpg", b""),
        ("broken.json", b"{"),
        ("both.jpg", b""),
        ("both.png", b""),
        ("both.txt", b"which"),
        ("twice.jpg", b""),
        ("twice.txt", b"a"),
        ("twice.txt", b"b"),
        ("same.jpg", b""),
        ("same.txt", b"same"),
        ("same.txt", b"same"),
        ("a.b.jpg", b""),
        ("a.b.txt", b"text"),
        ("odd.heic", b""),
        ("odd.txt", b"odd"),
        ("._x.txt", b"of a system"),
    ]
    found = read(write_tar(tmp_path / "t.tar", files))
    assert pairs(found) == [("t/same.jpg", "same"), ("t/odd.heic", "odd")]
    assert reasons(found) == {
        ("captions", "t.tar: only.txt", "text without an image"),
        ("captions", "t.tar: empty.txt", "empty caption"),
        ("captions", "t.tar: bytes.txt", "not UTF-8"),
        ("captions", "t.tar: none.json", "no caption"),
        ("captions", "t.tar: list.json", "key 'caption' is not str"),
        ("captions", "t.tar: broken.json", "not usable JSON in UTF-8"),
        ("captions", "t.tar: both.txt", "image name ambiguous"),
        ("captions", "t.tar: twice.txt", "two texts"),
        ("captions", "t.tar: a.b.txt", "name with two dots"),
        ("images", "t.tar: a.b.jpg", "name with two dots"),
    }
    assert found.num_captions == len(found.captions) + 9
    assert found.num_images == len(found.images) + 1
    ids = [record.caption_id for record in found.captions]
    assert ids == sorted(set(ids))


def test_masks_beside_an_image_are_not_its_rivals(tmp_path):
    files = {"0.jpg": b"", "0.seg.png": b"", "0.txt": b"text", "0.en.txt": b"other"}
    found = read(write_tar(tmp_path / "t.tar", files))
    assert names(found) == ["t/0.jpg"]
    assert pairs(found) == [("t/0.jpg", "text")]
    assert found.rejected == []


def test_long_texts_and_links_are_rejected_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_TEXT_BYTES", 5)
    write_tar(tmp_path / "t.tar", {"0.jpg": b"", "0.txt": b"longer", "1.jpg": b""})
    with tarfile.open(tmp_path / "t.tar", "a") as archive:
        link = tarfile.TarInfo("1.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "0.txt"
        archive.addfile(link)
    assert reasons(read(tmp_path / "t.tar")) == {
        ("captions", "t.tar: 0.txt", "text too long"),
        ("captions", "t.tar: 1.txt", "a link"),
    }


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("column", ["caption", "text"])
def test_a_table_has_a_text_or_a_list_of_texts_a_row(tmp_path, kind, column):
    images = [("a.jpg", b"a"), (None, b"b"), ("c.jpg", b"c"), ("d.jpg", b"d")]
    texts = pa.array([" A  cat", "b", "", None], kind)
    path = write_parquet(tmp_path / "train-0.parquet", images, {column: texts}, row_group_size=3)
    found = read(path)
    assert names(found) == ["train-0/a.jpg", "train-0/1", "train-0/c.jpg", "train-0/d.jpg"]
    assert pairs(found) == [("train-0/a.jpg", "A cat"), ("train-0/1", "b")]
    assert reasons(found) == {
        ("captions", "train-0.parquet[2]", "empty caption"),
        ("captions", "train-0.parquet[3]", "no caption"),
    }
    assert (found.num_images, found.num_captions) == (4, 4)
    lists = pa.array([["one", "two"], [], ["x", None], ["d"]], pa.list_(kind))
    found = read(write_parquet(tmp_path / "l.parquet", images, {column: lists}))
    assert pairs(found) == [("l/a.jpg", "one"), ("l/a.jpg", "two"), ("l/d.jpg", "d")]
    assert reasons(found) == {("captions", "l.parquet[2]", "no caption")}
    assert len(found.images) == 4


@pytest.mark.parametrize("columns", [{}, {"caption": [1, 2]}, {"text": [[1], [2]]}])
def test_a_table_without_texts_is_refused_with_its_columns(tmp_path, columns):
    path = write_parquet(tmp_path / "t.parquet", [("a", b""), ("b", b"")], columns)
    with pytest.raises(StageError, match=rf"^{KEY}: .*no column 'caption' or 'text' of texts; it"):
        read(path)


def test_names_are_those_by_which_the_images_are_read(tmp_path):
    for stem in ("00000", "00001"):
        write_tar(tmp_path / f"{stem}.tar", {"0.jpg": stem.encode(), "0.txt": b"text"})
        rows = [("0.jpg", stem.encode()), (None, stem.encode())]
        write_parquet(tmp_path / f"t{stem}.parquet", rows, {"text": ["text", "text"]})
    for suffix in ("tar", "parquet"):
        pattern = f"{tmp_path}/*.{suffix}"
        archive = ImageArchive([ImagePath(path=pattern)], key="data.train.images")
        found = read(pattern)
        assert names(found) == archive.all_names()
        for name in names(found):
            assert archive.find(name) == name
            assert archive.read(name).decode() in name
        assert len(found.captions) == len(names(found))
        assert len({record.caption_id for record in found.captions}) == len(found.captions)


def test_shards_and_tables_behind_a_url_read_alike(tmp_path):
    memory = fsspec.filesystem("memory")
    write_tar(tmp_path / "0.tar", {"0.jpg": b"", "0.txt": b"text"})
    write_parquet(tmp_path / "0.parquet", [("0.jpg", b"")], {"text": ["text"]})
    for path in (tmp_path / "0.tar", tmp_path / "0.parquet"):
        memory.put(str(path), f"/texts/{path.name}")
        for url in (f"memory://texts/{path.name}", f"memory://texts/*{path.suffix}"):
            assert is_packed(url, KEY)
            assert read(url) == read(path)
    memory.rm("/texts", recursive=True)


def test_what_is_packed_is_told_from_tables_that_name_images(tmp_path):
    write_tar(tmp_path / "0.tar", {"0.jpg": b""})
    write_parquet(tmp_path / "0.parquet", [("0.jpg", b"")], {"text": ["text"]})
    assert is_packed(f"{tmp_path}/*.tar", KEY)
    assert is_packed(tmp_path / "0.parquet", KEY)
    assert is_packed(f"{tmp_path}/*.parquet", KEY)
    pq.write_table(pa.table({"image": ["0.jpg"], "caption": ["a"]}), tmp_path / "0.parquet")
    (tmp_path / "0.csv").write_text("image,caption\n")
    for name in ("0.parquet", "0.csv", "none.csv", "none.parquet", "*.csv"):
        assert not is_packed(tmp_path / name, KEY)


def test_a_table_on_a_server_that_reads_no_parts_is_no_packed_one(tmp_path):
    server = RangeServer(tmp_path)
    server.ignores_ranges = True
    pq.write_table(pa.table({"image": ["0.jpg"] * 9, "caption": ["a"] * 9}), tmp_path / "0.parquet")
    try:
        assert not is_packed(f"{server.url}/0.parquet", KEY)
        assert len(read_captions(f"{server.url}/0.parquet", key=KEY).captions) == 9
    finally:
        server.stop()


def test_captions_of_any_layout_include_packed_ones(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"0.jpg": b"", "0.txt": b"text"})
    assert read_captions(path, key=KEY) == read(path)


def test_files_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "page.tar").write_text("<html>")
    (tmp_path / "zip.tar").write_bytes(b"PK\3\4")
    write_tar(tmp_path / "texts.tar", {"0.txt": b"text"})
    (tmp_path / "0.tar.gz").write_bytes(gzip.compress(b""))
    for name, reason in (
        ("folder.tar", "a folder, wanted a tar"),
        ("page.tar", "no readable tar"),
        ("zip.tar", "neither a tar nor a parquet table"),
        ("texts.tar", "holds no image"),
        ("none.tar", "does not exist"),
        ("none*.tar", "no file matches the pattern"),
        ("0.tar.gz", "compressed as a whole"),
    ):
        assert is_packed(tmp_path / name, KEY)
        with pytest.raises(StageError, match=f"^{KEY}: .*{reason}"):
            read(tmp_path / name)
