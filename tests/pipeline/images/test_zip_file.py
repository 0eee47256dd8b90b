import errno
import io
import zipfile

import pytest

from cache.errors import PatchcacheError
from pipeline.images import byte_file
from pipeline.images.zip_file import open_zip


@pytest.fixture
def path(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("name", b"data" * 10_000)
    return tmp_path / "a.zip"


def fail_from(monkeypatch, n):
    """Let the n-th read and all later ones fail; returns the sizes of all."""
    sizes = []

    def count(size):
        sizes.append(size)
        if len(sizes) >= n:
            raise OSError(errno.EIO, "Input/output error")

    class Failing(io.FileIO):
        def readinto(self, buffer):
            count(len(buffer))
            return super().readinto(buffer)

        def readall(self):
            count(-1)
            return super().readall()

    class Reader(READER, Failing):
        pass

    monkeypatch.setattr(byte_file, "LocalReader", Reader)
    return sizes


READER = byte_file.LocalReader


def read_all(path):
    with open_zip(path) as archive:
        assert archive.namelist() == ["name"]
        return archive.read("name")


def test_it_is_read_as_zipfile_reads_it(path):
    assert read_all(path) == b"data" * 10_000


def test_a_read_that_fails_is_never_a_damaged_zip(path, monkeypatch):
    sizes = fail_from(monkeypatch, 1000)
    read_all(path)
    assert len(sizes) > 3
    assert -1 in sizes
    for n in range(1, len(sizes) + 1):
        fail_from(monkeypatch, n)
        with pytest.raises(PatchcacheError, match=r"a\.zip: Input/output error") as caught:
            read_all(path)
        assert not isinstance(caught.value, OSError | ValueError | RuntimeError)


def test_a_file_that_is_no_zip_and_a_missing_file_get_their_own_errors(path):
    path.write_bytes(b"text")
    with pytest.raises(zipfile.BadZipFile):
        open_zip(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_zip(path)
