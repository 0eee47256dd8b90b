"""The page cache: bringing a folder's files into it, dropping them from it, looking what is there.

Only this system's own memory is meant. What a disk or the host of a virtual machine keeps in its
memory stays there, so that a cold run is slower on a machine that has no such host.
"""

import ctypes
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

MOST_LEFT = 0.01
"""Share of a folder's pages that may be left after dropping it."""

ATTEMPTS, WAIT_SECONDS = 25, 0.2
"""Worker processes take some time to end."""

CHUNK_BYTES = 1 << 22


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder and of those below it, without empty ones."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if path.stat().st_size]


def sync(folder: Path) -> None:
    """Bring a folder's files to the disk: only what lies there can be dropped."""
    for path in files_of(folder):
        _on_file(path, os.fsync)


def warm(folder: Path) -> None:
    """Read a folder's files once."""
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK_BYTES):
                pass


def drop(folder: Path) -> None:
    """Drop a folder's files from the page cache.

    The kernel keeps the pages that some process has mapped: readers must have ended before.

    Raises:
        RuntimeError: More than a hundredth of the pages is still there.
    """
    left = 1.0
    for _ in range(ATTEMPTS):
        for path in files_of(folder):
            _on_file(path, _drop)
        left = resident_share(folder)
        if left <= MOST_LEFT:
            return
        time.sleep(WAIT_SECONDS)
    raise RuntimeError(f"{folder}: {left:.0%} of its pages stay in the page cache")


def resident_share(folder: Path) -> float:
    """Return which share of the pages of a folder's files is in the page cache, by mincore."""
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    resident = total = 0
    for path in files_of(folder):
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        pages = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
        if mincore(mapped.ctypes.data, mapped.size, pages.ctypes.data):
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        resident += int((pages & 1).sum())
        total += len(pages)
    return resident / total


def _drop(descriptor: int) -> None:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _on_file(path: Path, call: Callable[[int], None]) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        call(descriptor)
    finally:
        os.close(descriptor)
