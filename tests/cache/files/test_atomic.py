import errno
import hashlib
import json
import os
import resource
from pathlib import Path

import pytest

from cache.files.atomic import (
    canonical_json,
    link_or_copy,
    path_in_errors,
    replacing,
    sha256_of,
    sha256_of_pieces,
    write_bytes,
    write_json,
    write_text,
)


def test_a_file_appears_whole_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_published_file_is_replaced_not_written_into(tmp_path):
    path, reader = tmp_path / "a.txt", tmp_path / "link.txt"
    write_text(path, "old")
    os.link(path, reader)
    write_text(path, "new")
    assert (path.read_text(), reader.read_text()) == ("new", "old")


def test_pieces_are_written_one_behind_the_other(tmp_path):
    path = tmp_path / "deep" / "a"
    pieces = [b"head", memoryview(bytes(100_000)), b"", b"tail"]
    write_bytes(path, *pieces)
    assert path.read_bytes() == b"head" + bytes(100_000) + b"tail"
    assert sha256_of(path) == sha256_of_pieces(pieces)
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def small_files_only():
    """No file of more than a thousand bytes can be written, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files_only")
@pytest.mark.parametrize("sizes", [[1001], [999, 2], [0, 10**6], [1000, 1]])
def test_a_write_that_fails_names_the_file_and_leaves_the_old_one(tmp_path, sizes):
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(OSError, match="File too large") as caught:
        write_bytes(path, *map(bytes, sizes))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("small_files_only")
def test_a_copy_that_fails_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    source, target = Path(__file__), tmp_path / "target"
    write_bytes(target, b"old")
    with pytest.raises(OSError, match="File too large") as caught:
        link_or_copy(source, target)
    assert str(tmp_path) in str(caught.value)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failing_disk_is_named_with_the_file():
    with pytest.raises(OSError, match="Input/output error: 'a'"), path_in_errors(Path("a")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    # Neither another path nor an error that is not of the system.
    with pytest.raises(OSError, match="error: 'b'"), path_in_errors(Path("a")):
        raise OSError(errno.EIO, "error", "b")
    with pytest.raises(OSError, match=r"^words$"), path_in_errors(Path("a")):
        raise OSError("words")


def test_json_reads_back_and_refuses_what_json_has_no_word_for(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, "ü"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, "ü"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, "ü"]}


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [2]}) == canonical_json({"a": [2], "b": 1})
    assert canonical_json({"b": 1, "a": [2]}) == b'{"a":[2],"b":1}\n'


def test_a_link_is_the_same_file_and_replaces_without_writing(tmp_path):
    source, target, reader = (tmp_path / name for name in ("source", "deep/target", "reader"))
    source.write_text("new")
    target.parent.mkdir()
    target.write_text("old")
    os.link(target, reader)
    link_or_copy(source, target)
    assert target.samefile(source)
    assert reader.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


def test_of_a_symbolic_link_it_links_the_file(tmp_path):
    source, link, target = (tmp_path / name for name in ("source", "folder/link", "deep/target"))
    source.write_text("text")
    link.parent.mkdir()
    link.symlink_to("../source")
    link_or_copy(link, target)
    assert not target.is_symlink()
    assert target.samefile(source)
    # A link to the target itself leaves it as it is.
    itself = tmp_path / "itself"
    itself.symlink_to(target)
    link_or_copy(itself, target)
    assert target.read_text() == "text"
    assert list(target.parent.iterdir()) == [target]


def test_without_hard_links_it_copies(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_text("text")
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_text() == "text"
    assert not (tmp_path / "target").samefile(tmp_path / "source")


def test_the_hash_is_that_of_the_whole_file(tmp_path):
    data = bytes(3 * 2**20 + 7)
    (tmp_path / "a").write_bytes(data)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(data).hexdigest()


@pytest.fixture
def synced(monkeypatch):
    """Record what is brought to the disk: a file by its size, a folder by its names, in order."""
    found = []
    fsync = os.fsync

    def recording(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        names = sorted(one.name for one in path.iterdir()) if path.is_dir() else []
        found.append(names if path.is_dir() else path.read_bytes())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    return found


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_all_goes_on(
    tmp_path, synced
):
    with replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"content")
    assert synced == [b"content", ["a"]]


@pytest.mark.parametrize(("write", "content"), [(write_text, "text"), (write_json, [1])])
def test_a_file_is_synced_with_its_folder(tmp_path, synced, write, content):
    write(tmp_path / "a", content)
    written = (tmp_path / "a").read_bytes()
    assert written in synced
    assert synced.index(written) < len(synced) - 1
    assert synced[-1] == ["a"]


def test_nothing_is_synced_or_named_when_the_writing_fails(tmp_path, synced):
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "half \ud800")
    assert synced == []
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_temporary_file_is_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (tmp_path / ".report.partial").symlink_to(precious)
    write_text(tmp_path / "report", "new")
    assert precious.read_text() == "kept"
    assert (tmp_path / "report").read_text() == "new"
    assert not (tmp_path / "report").is_symlink()
