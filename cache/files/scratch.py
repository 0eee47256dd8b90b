"""Private temporary folders that are deleted with their owner, or after a kill by the next one.

The owner holds a lock on a file in the folder, which a kill releases. Forked children inherit the
lock, and keep the folder as long as one of them lives. A folder without the lock file is not ours,
whatever its name.
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
    """A temporary folder, deleted with this object or at the end of its `with` block."""

    def __init__(self) -> None:
        """Create the folder, and delete folders whose owner was killed."""
        remove_abandoned(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Renamed once it is locked: no process ever finds an unlocked file under this name.
        lock = (self.path / f"{LOCK}.new").open("wb")
        with contextlib.suppress(OSError):
            # On a file system without locks no process can lock the file, so none deletes it.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (self.path / f"{LOCK}.new").rename(self.path / LOCK)
        self._remove = weakref.finalize(self, _remove, self.path, os.getpid(), lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *error: object) -> None:
        self._remove()


def remove_abandoned(parent: Path) -> None:
    """Delete the folders of this user whose owner does not live any more."""
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
        # Fails while the owner lives, also in another container.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(descriptor)


def _remove(folder: Path, owner: int, lock: BinaryIO) -> None:
    """Delete a folder, unless this is a forked child of its owner."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
    # Closed and not unlocked: a forked child would unlock it for the parent, too.
    lock.close()
