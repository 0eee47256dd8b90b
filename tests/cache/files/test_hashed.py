"""A file has the sha256 of its bytes, however they are written, and no more of them than it may."""

from pathlib import Path

import pytest

from cache.errors import CorruptShardError
from cache.files.atomic import sha256_of
from cache.files.hashed import HashedFile


@pytest.mark.parametrize("as_path", [False, True])
def test_a_file_is_hashed_however_it_is_written(tmp_path, as_path):
    target = HashedFile(tmp_path / "file", 100)
    if as_path:
        Path(target).write_bytes(b"ab" * 40)
    else:
        for _ in range(40):
            target.write(b"ab")
    assert target.finish() == (80, sha256_of(tmp_path / "file"))


def test_more_bytes_than_there_may_be_are_refused(tmp_path):
    with HashedFile(tmp_path / "file", 100) as target:
        target.write(b"x" * 100)
        with pytest.raises(CorruptShardError, match="more than 100 bytes came"):
            target.write(b"x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file():
    target = HashedFile(Path("/dev/full"), 1 << 30)
    with pytest.raises(OSError, match=r"No space left.*'/dev/full'"):
        target.write(b"x" * (1 << 20))
    target.close()
