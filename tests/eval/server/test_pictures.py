"""The pictures that the page may open: uploads and examples."""

import os
from pathlib import Path

import pytest

from eval.server import pictures as pictures_module
from eval.server.pictures import MAX_UPLOAD_AGE, PagePictures, UnknownPictureError
from workspace.errors import StageError


@pytest.fixture
def pictures(tmp_path):
    return PagePictures(tmp_path / "uploads")


def stored(tmp_path):
    return {path.read_bytes() for path in (tmp_path / "uploads").iterdir()}


def test_only_its_visitor_reads_an_upload(pictures):
    path = pictures.add_upload("/home/me/C:\\photos\\a\x00b.jpg", b"data", "me")
    assert pictures.read(path, "me") == ("ab.jpg", b"data")
    with pytest.raises(UnknownPictureError):
        pictures.read(path, "another")
    again = pictures.add_upload("ab.jpg", b"data", "me")
    assert again != path, "the content does not tell the path"


def test_examples_are_read_by_everybody(pictures, tmp_path):
    example = tmp_path / "1.jpg"
    example.write_bytes(b"example")
    pictures.add_examples([example])
    assert pictures.read(str(example), "anybody") == ("1.jpg", b"example")


def test_every_other_path_has_the_same_answer(pictures, tmp_path, monkeypatch):
    upload = Path(pictures.add_upload("1.jpg", b"data", "me"))
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    link = upload.parent / "link"
    link.symlink_to(secret)
    monkeypatch.chdir(tmp_path)
    spellings = [
        secret, "secret.jpg", link, link.parent, upload.parent / "missing", "/proc/self/environ",
        f"{upload.parent}/../secret.jpg", f"{upload.parent}/./{upload.name}", f"file://{upload}",
        "http://127.0.0.1/1.jpg", "", "\x00", "/", upload.name, f"{upload}/", "é" * 5000,
    ]  # fmt: skip
    answers = set()
    for spelling in spellings:
        with pytest.raises(UnknownPictureError) as refused:
            pictures.read(str(spelling), "me")
        answers.add(str(refused.value))
    assert len(answers) == 1
    assert "/" not in answers.pop()


def test_an_upload_that_somebody_else_removed_is_unknown(pictures):
    path = pictures.add_upload("1.jpg", b"data", "me")
    Path(path).unlink()
    with pytest.raises(UnknownPictureError):
        pictures.read(path, "me")


def test_a_failing_disk_is_named_without_the_path(pictures, monkeypatch):
    path = pictures.add_upload("1.jpg", b"data", "me")

    def fail(self):
        raise OSError(5, os.strerror(5), str(self))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(StageError, match=r"^1\.jpg: cannot be read: Input/output error\.$"):
        pictures.read(path, "me")


def test_the_oldest_uploads_go_when_there_are_too_many(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module, "MAX_UPLOADS", 3)
    for number in range(5):
        pictures.add_upload("1.jpg", b"%d" % number, "me")
    assert stored(tmp_path) == {b"2", b"3", b"4"}


def test_the_oldest_uploads_go_when_they_are_too_large(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_module, "MAX_UPLOADS_BYTES", 10)
    for data in (b"aaaa", b"bbbb", b"cccccc"):
        pictures.add_upload("1.jpg", data, "me")
    assert stored(tmp_path) == {b"bbbb", b"cccccc"}


def test_an_upload_that_cannot_be_written_leaves_nothing(pictures, tmp_path, monkeypatch):
    def fail(self, data):
        with self.open("wb") as file:
            file.write(data[:2])
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match="No space left"):
            pictures.add_upload("1.jpg", b"data", "me")
    assert stored(tmp_path) == set()
    pictures.add_upload("1.jpg", b"data", "me")
    assert stored(tmp_path) == {b"data"}


def test_uploads_go_by_age_and_examples_stay(pictures, tmp_path, monkeypatch):
    example = tmp_path / "1.jpg"
    example.write_bytes(b"example")
    pictures.add_examples([example])
    times = iter([100.0, 200.0])
    monkeypatch.setattr(pictures_module.time, "monotonic", lambda: next(times))
    first, second = (pictures.add_upload("1.jpg", data, "me") for data in (b"first", b"second"))
    pictures.remove_old(100.0 + MAX_UPLOAD_AGE)
    assert stored(tmp_path) == {b"first", b"second"}
    pictures.remove_old(101.0 + MAX_UPLOAD_AGE)
    assert stored(tmp_path) == {b"second"}
    with pytest.raises(UnknownPictureError):
        pictures.read(first, "me")
    assert pictures.read(second, "me") == ("1.jpg", b"second")
    pictures.remove_old(1e9)
    assert pictures.read(str(example), "me") == ("1.jpg", b"example")
