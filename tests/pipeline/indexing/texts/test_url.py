import fsspec
import pytest

from pipeline.indexing.captions import read_captions
from pipeline.indexing.instruct import read_instruct
from pipeline.indexing.pope import read_question_files
from pipeline.indexing.texts import url
from workspace.errors import StageError


@pytest.fixture
def memory():
    """A file system of fsspec without a disk."""
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()


def test_texts_are_read_from_a_url(memory):
    memory.pipe("/texts/c.csv", b"image,caption\na.jpg,A dog.\n")
    file = read_captions("memory://texts/c.csv", key="k")
    assert (file.captions[0].caption, file.captions[0].record) == ("A dog.", "c.csv: line 2")
    memory.pipe("/texts/q.csv", b"image,question,answer\na.jpg,Who?,Me.\n")
    asked = read_instruct(["memory://texts/q.csv"], [], read_question_files([]), 0)
    assert len(asked.conversations) == 1


def test_the_copy_is_deleted(memory):
    memory.pipe("/texts/c.csv", b"image,caption\n")
    with url.copy_of_url("memory://texts/c.csv", "k") as path:
        assert path.exists()
    assert not path.exists()


def test_a_missing_file_behind_a_url_is_named(memory):
    memory.pipe("/texts/c.csv", b"x")
    with pytest.raises(StageError, match=r"^k: memory://texts/d\.csv does not exist"):
        read_captions("memory://texts/d.csv", key="k")


def test_a_url_of_an_unknown_kind_is_refused_with_its_key():
    with pytest.raises(StageError, match=r"^k: nothing://texts: cannot be read here"):
        read_captions("nothing://texts/d.csv", key="k")


def test_a_file_that_comes_in_part_is_refused(memory, monkeypatch):
    memory.pipe("/texts/c.csv", b"image,caption\n")
    monkeypatch.setattr(url.RemoteFolder, "size", lambda *_: 20)
    with pytest.raises(StageError, match=r"c\.csv: 14 bytes came, the server says 20"):
        read_captions("memory://texts/c.csv", key="k")


def test_the_query_of_a_url_is_not_in_the_name(memory):
    memory.pipe("/texts/c.tsv?download=true", b"image\tcaption\na.jpg\tA dog.\n")
    file = read_captions("memory://texts/c.tsv?download=true", key="k")
    assert file.images[0].record == "c.tsv: line 2"
