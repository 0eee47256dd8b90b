"""Locks that keep a folder of the workspace for one process at a time."""

import contextlib
import errno
import fcntl
import sys
from collections.abc import Iterator
from pathlib import Path

from workspace.errors import StageError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""How file systems say that they have no locks: NFS without lockd, Lustre without flock, FUSE."""


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Create the folder if needed and hold an exclusive lock on it.

    On a file system without locks the user is warned, and the work goes on.

    Raises:
        StageError: Another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            # Not flock, which forked workers would go on holding after a kill of their parent.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise StageError(
                f"{folder}: another process works in it. Wait until it is done, then run the same "
                f"command again."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(
                f"warning: {folder}: its file system has no locks ({error.strerror}), so that "
                f"nothing keeps a second process out. See that none works in it.",
                file=sys.stderr,
                flush=True,
            )
        yield
