"""A lock on a folder, against two processes, or two threads, that write the same folder."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..errors import PatchcacheError
from .atomic import check_writable_in_place

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks: NFS without lockd, Lustre without flock, FUSE."""

_held: dict[tuple[int, Path], object] = {}
"""The locks of this process, by process number and folder. To the system all threads of a process
hold its locks, and a process loses a lock as soon as it closes the file once."""


@contextlib.contextmanager
def exclusive_lock(folder: Path, error: type[PatchcacheError]) -> Iterator[None]:
    """Create the folder if needed and hold an exclusive lock on it.

    On a file system without locks a warning is printed, and the block runs.

    Args:
        folder: Gets a file `.lock`.
        error: Raised if another process, or thread, holds the lock, or `.lock` is a link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, token = (os.getpid(), folder.resolve()), object()
    # One operation, unlike a look and an assignment.
    if _held.setdefault(key, token) is not token:
        raise error(f"{folder}: this process works in it already. Wait until that call has ended.")
    try:
        check_writable_in_place(folder / ".lock", error)
        with (folder / ".lock").open("a") as file:
            _lock(file, folder, error)
            yield
    finally:
        del _held[key]


def _lock(file: TextIO, folder: Path, error: type[PatchcacheError]) -> None:
    try:
        # Not flock: forked workers would hold it after their parent was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise error(
            f"{folder}: another process works in it. Wait until it is done, then run this "
            f"command again."
        ) from None
    except OSError as failure:
        if failure.errno not in NO_LOCKS:
            raise
        print(
            f"warning: {folder}: its file system has no locks ({failure.strerror}). Make sure "
            f"that no other process works in it.",
            file=sys.stderr,
            flush=True,
        )
