"""One array over the features of all shards, so that a single `numpy.take` gathers a batch.

A range of addresses is reserved first, and the features of each shard are mapped into it, a whole
number of rows apart: every row starts at a multiple of the row's size. If addresses suffice, shards
are also placed so that huge pages of a file can be mapped. The system reads a page when it is first
touched, and all processes share it.

Letters: P patches, D width of the vision tower.
"""

import contextlib
import ctypes
import errno
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import CorruptShardError

MAP_FIXED = 0x10
"""Flag that puts a mapping at a given address: <sys/mman.h> of Linux and macOS."""

RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
"""Flags of addresses without memory."""

MAP_FAILED = ctypes.c_void_p(-1).value

HUGE_PAGE = 1 << 21
"""Bytes of a huge page of x86-64 and of 64-bit Arm."""

MAX_RESERVED_BYTES = 1 << 45
"""Most bytes of addresses to reserve for huge pages: a quarter of what a process has."""

HUGE_SHARE = 0.5
"""A store is read in huge pages if it needs at most this share of the memory."""

CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux keeps limits of memory, and where it names the groups of this process."""


class FeatureMapping:
    """An array over the rows of all shards; a shard's rows can be read once it is attached."""

    def __init__(self, num_rows: Sequence[int], patches: int, width: int, offset: int = 0) -> None:
        """Reserve addresses, which takes no memory.

        Args:
            num_rows: Rows of each shard.
            patches: P.
            width: D.
            offset: Bytes before the features in most shard files. A huge page can be mapped if its
                address and its offset in the file are equal modulo its size.
        """
        self._row_bytes = patches * width * np.dtype("<f2").itemsize
        sizes = self._spaced(num_rows, HUGE_PAGE)
        if int(sizes.sum()) * self._row_bytes > MAX_RESERVED_BYTES:
            sizes = self._spaced(num_rows, mmap.ALLOCATIONGRANULARITY)
        self.starts: NDArray[np.int64] = np.cumsum(sizes) - sizes
        """Position of each shard's first row in `rows`."""
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
        """Return the rows to reserve for each shard: they fill whole pages, and there is at least
        one more than the shard has, since the next mapping may begin in the page before its rows.
        """
        unit = math.lcm(self._row_bytes, page) // self._row_bytes
        return np.array([(n // unit + 1) * unit for n in num_rows] or [unit], dtype=np.int64)

    def attach(
        self, number: int, path: Path, *, num_bytes: int, offset: int, rows: int
    ) -> tuple[int, int] | None:
        """Map the features of a shard to their place.

        Args:
            number: Of the shard.
            path: Its file.
            num_bytes: Expected size of the file.
            offset: Bytes before the features in the file, a multiple of 4096.
            rows: Number of rows.

        Returns:
            Device and number of the file, which tell it from others of its name; None without rows.

        Raises:
            CorruptShardError: The file has another size.
            OSError: The system cannot map it; names the file.
        """
        if not rows:
            return None
        descriptor = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            found = status.st_size
            if found != num_bytes or offset + rows * self._row_bytes > found:
                raise CorruptShardError(
                    f"{path}: has {found} bytes, had {num_bytes} when it was checked. Open the "
                    f"store again; published files must be replaced, never written into."
                )
            wanted = self.rows.ctypes.data + int(self.starts[number]) * self._row_bytes
            # A mapping begins with a page, which can be larger than the format's 4096 bytes.
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
            if ctypes.get_errno() == errno.ENOMEM:
                # Linux has no other number for a process with too many mappings.
                reason += (
                    ". A store needs two mappings a shard; `sysctl vm.max_map_count` shows how "
                    "many a process may have"
                )
            raise OSError(ctypes.get_errno(), f"cannot be mapped: {reason}", str(path))
        if self._in_huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            # The first touch of a huge page reads 2 MB. That pays only if they stay in memory until
            # their other rows are needed.
            with contextlib.suppress(OSError):
                self._advise(number, rows, mmap.MADV_HUGEPAGE)
        return status.st_dev, status.st_ino

    def detach(self, number: int, rows: int) -> None:
        """Put zeros in the place of a shard's features: a deleted file's disk space is freed."""
        start = self.rows.ctypes.data + int(self.starts[number]) * self._row_bytes
        before = start % mmap.PAGESIZE
        length = rows * self._row_bytes + before
        flags = RESERVED | MAP_FIXED
        if self._libc_mmap(start - before, length, mmap.PROT_READ, flags, -1, 0) == MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise OSError(ctypes.get_errno(), f"a shard cannot be unmapped: {reason}")

    def read_ahead(self, number: int, rows: int) -> None:
        """Ask the system to read an attached shard's features into memory; does not wait."""
        self._advise(number, rows, mmap.MADV_WILLNEED)

    def request(self, rows: NDArray[np.integer]) -> None:
        """Ask the system for rows that are read next, all at once; does not wait.

        Of a store that does not fit the memory each touch may read from the disk: without this a
        page or two at a time, or megabytes around them.

        Args:
            rows: Positions in `rows`, of attached shards.
        """
        if not self._in_huge_pages:
            for row in rows.tolist():
                self._advise_rows(row, 1, mmap.MADV_WILLNEED)

    def _advise(self, number: int, rows: int, advice: int) -> None:
        self._advise_rows(int(self.starts[number]), rows, advice)

    def _advise_rows(self, first: int, rows: int, advice: int) -> None:
        start = self._skipped + first * self._row_bytes
        before = start % mmap.PAGESIZE
        self._reserved.madvise(advice, start - before, rows * self._row_bytes + before)


def memory_bytes() -> int:
    """Return the bytes of memory that this process can use: the machine's, or its container's."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _limit_files():
        # Absent where a container sees its own group as the root; "max" without a limit.
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(path.read_text()))
    return min(limits)


def _limit_files() -> Iterator[Path]:
    """Yield the files of this process's control groups, and of those above, that limit memory."""
    groups = [("", "/")]
    with contextlib.suppress(OSError):
        lines = OWN_GROUPS.read_text().splitlines()
        groups += [(kind, group) for _, kind, group in (line.split(":", 2) for line in lines)]
    for kind, group in groups:
        # Version 2 has one hierarchy; version 1 has one for memory.
        if kind in ("", "memory"):
            name = "memory.limit_in_bytes" if kind else "memory.max"
            own = Path(group.lstrip("/"))
            yield from (CONTROL_GROUPS / kind / part / name for part in (own, *own.parents))


def _reserve(num_bytes: int) -> mmap.mmap:
    try:
        return mmap.mmap(-1, num_bytes, flags=RESERVED, prot=mmap.PROT_READ)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: {num_bytes} bytes of addresses (not of memory) cannot be reserved "
            f"for the shards. See `ulimit -v`",
        ) from None
