"""Gives a server a temporary folder, and removes those that killed servers left behind."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "patchcache-serve-"


@contextlib.contextmanager
def server_folder() -> Iterator[Path]:
    """Create a folder that only this user can read, and remove it at the end.

    The process holds a lock on the folder as long as it lives, so a folder that nobody has locked
    belongs to a server that was killed. Such folders are removed first.
    """
    remove_leftovers()
    folder, descriptor = _create_locked()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def remove_leftovers() -> None:
    """Remove the folders of this user's servers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = _open(folder)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    # The lock of a server that lives raises an error.
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _create_locked() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        try:
            descriptor = _open(folder)
        except FileNotFoundError:
            continue
        # A file system without locks: no other server removes the folder there either.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Another server that starts takes the folder for a leftover until it is locked.
        if folder.is_dir():
            return folder, descriptor
        os.close(descriptor)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
