"""Locks on folders of the workspace, against two processes that write the same folder."""

import contextlib
import errno
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from workspace.errors import StageError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks: NFS without lockd, Lustre without flock, FUSE."""


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Create the folder if needed and hold an exclusive lock on it.

    On a file system without locks a warning is printed, and the block runs.

    Raises:
        StageError: Another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            # Not flock: forked workers would hold it after their parent was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise StageError(
                f"{folder}: another process works in it. Wait until it is done, then run this "
                f"command again."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: {folder}: its file system has no locks ({error.strerror}). Make sure "
                f"that no other process works in it.",
                file=sys.stderr,
                flush=True,
            )
        yield
