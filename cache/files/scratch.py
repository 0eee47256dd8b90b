"""Temporary folders that are private, and removed with their owner or after its death.

The owner holds a lock on a file in the folder. A kill releases it, so that the next owner of a
folder knows which ones nobody uses any more. Forked children inherit the lock, and keep the folder
alive for as long as one of them lives. A folder without that file is somebody's own, whatever its
name is.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

PREFIX = "patchcache-"

LOCK = ".lock"


class ScratchFolder:
    """A temporary folder, removed with this object or at the end of its `with` block."""

    def __init__(self) -> None:
        """Create the folder, after removing those that a kill has left."""
        remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Renamed once it is locked: a process that finds it under its name finds it locked.
        lock = (self.path / f"{LOCK}.new").open("wb")
        with contextlib.suppress(OSError):
            # On a file system without locks nobody gets this one, so nothing is removed.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (self.path / f"{LOCK}.new").rename(self.path / LOCK)
        self._remove = weakref.finalize(self, _remove, self.path, os.getpid(), lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self._remove()


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
