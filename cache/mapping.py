"""One array over the features of all shards, so that a batch is gathered by a single `numpy.take`.

A range of addresses is reserved first. Each shard's features are then mapped into it, a whole
number of rows apart, so that every row lies at a multiple of the row's size from the start; and,
where there is room, where the file's huge pages can be mapped as such. Pages are read when they are
first touched, and shared by all processes.

Letters: P patches, D width of the vision tower.
"""

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptShardError

MAP_FIXED = 0x10
"""Put the mapping exactly there: <sys/mman.h> of Linux and macOS."""

MAP_FAILED = ctypes.c_void_p(-1).value

HUGE_PAGE = 1 << 21
"""Bytes of a huge page of x86-64 and of 64-bit Arm."""

MAX_RESERVED_BYTES = 1 << 45
"""Most addresses that are reserved for huge pages: a quarter of what a process has."""

HUGE_SHARE = 0.5
"""Share of the memory up to which a store is read in huge pages."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Bytes that a container may use, or "max"."""


class FeatureMapping:
    """Addresses for the rows of some shards; a shard's rows can be read once it is attached."""

    def __init__(self, num_rows: Sequence[int], patches: int, width: int, offset: int = 0) -> None:
        """Reserve addresses; takes no memory.

        Args:
            num_rows: Rows of each shard.
            patches: P.
            width: D.
            offset: Where the features start in the files of most shards, in bytes. A page of a
                file can be mapped as a huge one if it is as far from a multiple of its size here as
                it is there.
        """
        self._row_bytes = patches * width * np.dtype("<f2").itemsize
        sizes = self._spaced(num_rows, HUGE_PAGE)
        if int(sizes.sum()) * self._row_bytes > MAX_RESERVED_BYTES:
            sizes = self._spaced(num_rows, mmap.ALLOCATIONGRANULARITY)
        self.starts: NDArray[np.int64] = np.cumsum(sizes) - sizes
        """Row of each shard's first row in `rows`."""
        num_bytes = int(sizes.sum()) * self._row_bytes
        self._reserved = _reserve(num_bytes + HUGE_PAGE)
        address = np.frombuffer(self._reserved, np.uint8).ctypes.data
        self._skipped = (offset - address) % HUGE_PAGE
        self.rows: NDArray[np.float16] = np.frombuffer(
            self._reserved, "<f2", num_bytes // 2, self._skipped
        ).reshape(-1, patches, width)
        """float16 [rows, P, D], read-only; zeros where no shard is attached."""
        needed = sum(num_rows) * self._row_bytes
        self._in_huge_pages = needed <= HUGE_SHARE * memory_bytes()
        self._libc_mmap = ctypes.CDLL(None, use_errno=True).mmap
        self._libc_mmap.restype = ctypes.c_void_p
        self._libc_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
        self._libc_mmap.argtypes += [ctypes.c_longlong]

    def _spaced(self, num_rows: Sequence[int], page: int) -> NDArray[np.int64]:
        """Round the rows of each shard up to a number that fills whole pages, and one row more:
        the next mapping may begin in the page before its rows.
        """
        unit = math.lcm(self._row_bytes, page) // self._row_bytes
        return np.array([(n // unit + 1) * unit for n in num_rows] or [unit], dtype=np.int64)

    def attach(self, number: int, path: Path, *, num_bytes: int, offset: int, rows: int) -> None:
        """Map the features of a shard to their place.

        Args:
            number: Of the shard.
            path: Its file.
            num_bytes: Size that the file must have.
            offset: Where in the file the features start, a multiple of the page size.
            rows: How many there are.

        Raises:
            CorruptShardError: The file has another size by now.
        """
        if not rows:
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            found = os.fstat(descriptor).st_size
            if found != num_bytes or offset + rows * self._row_bytes > found:
                raise CorruptShardError(
                    f"{path}: has {found} bytes, had {num_bytes} when it was checked. Open the "
                    f"store again; published files must be replaced, never written into."
                )
            wanted = self.rows.ctypes.data + int(self.starts[number]) * self._row_bytes
            # Mappings begin with a page, which can be larger than the 4096 bytes of the format.
            before = offset % mmap.PAGESIZE
            address = self._libc_mmap(
                wanted - before,
                rows * self._row_bytes + before,
                mmap.PROT_READ,
                mmap.MAP_SHARED | MAP_FIXED,
                descriptor,
                offset - before,
            )
        finally:
            os.close(descriptor)
        if address == MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise OSError(ctypes.get_errno(), f"cannot be mapped: {reason}", str(path))
        if self._in_huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            # A touch of a page that is not in memory then reads 2 MB at least, which is right only
            # if they are still there when their other rows are asked for.
            with contextlib.suppress(OSError):
                self._advise(number, rows, mmap.MADV_HUGEPAGE)

    def read_ahead(self, number: int, rows: int) -> None:
        """Ask the system to bring the features of an attached shard into memory; does not wait."""
        self._advise(number, rows, mmap.MADV_WILLNEED)

    def _advise(self, number: int, rows: int, advice: int) -> None:
        start = self._skipped + int(self.starts[number]) * self._row_bytes
        before = start % mmap.PAGESIZE
        self._reserved.madvise(advice, start - before, rows * self._row_bytes + before)


def memory_bytes() -> int:
    """Return how much memory this process can use: the machine's, or its container's."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):
        return min(physical, int(CGROUP_LIMIT.read_text()))
    return physical


def _reserve(num_bytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        return mmap.mmap(-1, num_bytes, flags=flags, prot=mmap.PROT_READ)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: {num_bytes} bytes of addresses, of which none is memory yet, "
            f"cannot be reserved for the shards. See `ulimit -v`",
        ) from None
