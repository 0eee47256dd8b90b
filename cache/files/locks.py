"""A lock on a folder, against two processes that write the same folder."""

import contextlib
import errno
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import PatchcacheError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of file systems without locks: NFS without lockd, Lustre without flock, FUSE."""


@contextlib.contextmanager
def exclusive_lock(folder: Path, error: type[PatchcacheError]) -> Iterator[None]:
    """Create the folder if needed and hold an exclusive lock on it.

    On a file system without locks a warning is printed, and the block runs.

    Args:
        folder: Gets a file `.lock`.
        error: Raised if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
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
        yield
