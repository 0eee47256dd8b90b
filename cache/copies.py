"""Folders for the copies of remote files: private, removed with their owner or after its death.

The owner holds a lock on a file in the folder. A kill releases it, so that the next owner of a
folder knows which ones nobody uses any more. Forked children inherit the lock, and keep the folder
alive for as long as one of them lives.
"""

import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

from cache.errors import CorruptShardError
from cache.files import sha256_of

PREFIX = "patchcache-"

LOCK = ".lock"


def make_folder(owner: object) -> Path:
    """Make a folder that lives as long as an object, after removing those that a kill has left."""
    remove_abandoned(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    # Renamed once it is locked: whoever finds it under its name finds it locked.
    lock = (folder / f"{LOCK}.new").open("wb")
    with contextlib.suppress(OSError):
        # Some file systems have no locks; there nobody gets this one, so nothing is removed.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / f"{LOCK}.new").rename(folder / LOCK)
    weakref.finalize(owner, _remove, folder, os.getpid(), lock)
    return folder


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of this user whose owner does not live any more."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX):
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(entry)


def _remove_if_abandoned(entry: os.DirEntry[str]) -> None:
    found = entry.stat(follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    descriptor = os.open(Path(entry.path) / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        # Refused while somebody holds it, in whatever container.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _remove(folder: Path, owner: int, lock: BinaryIO) -> None:
    """Delete a folder, unless this is a forked child of the process that made it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
    # Not unlocked, which would unlock it for the parent, too.
    lock.close()


class HashedFile(io.BufferedWriter):
    """A new file whose bytes are hashed while they are written.

    Some file systems of fsspec write into a file object, others open a path: it is both. What was
    not written through it is hashed afterwards.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Create the file.

        Args:
            path: Of the file.
            most_bytes: How many may be written.
        """
        super().__init__(io.FileIO(path, "wb"))
        self._path = path
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._digest = hashlib.sha256()

    def __fspath__(self) -> str:
        return str(self._path)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write bytes and hash them.

        Raises:
            CorruptShardError: There are more than there may be.
            OSError: They cannot be stored; names the file.
        """
        self._num_bytes += len(data)
        if self._num_bytes > self._most_bytes:
            raise CorruptShardError(f"more than {self._most_bytes} bytes came")
        try:
            written = super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._digest.update(data)
        return written

    def finish(self) -> tuple[int, str]:
        """Close the file and return how many bytes it has, and their sha256 in hexadecimal."""
        self.close()
        num_bytes = self._path.stat().st_size
        if num_bytes != self._num_bytes:
            return num_bytes, sha256_of(self._path)
        return num_bytes, self._digest.hexdigest()
