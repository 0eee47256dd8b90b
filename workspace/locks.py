"""Locks on folders of the workspace, against two commands that write the same folder."""

from contextlib import AbstractContextManager
from pathlib import Path

from cache.files.locks import exclusive_lock
from workspace.errors import StageError


def folder_lock(folder: Path) -> AbstractContextManager[None]:
    """Return a block that holds an exclusive lock on a folder, created if needed.

    The block raises a StageError if another process holds the lock.
    """
    return exclusive_lock(folder, StageError)
