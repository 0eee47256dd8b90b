"""A file in memory that takes room only for written bytes.

HDF5 writes metadata when an object is closed, and only prints errors of that. So it never writes to
a disk here: it writes to a `SparseFile`, whose bytes go to the disk in calls that raise errors.
"""

import io
from typing import Any


class SparseFile(io.RawIOBase):
    """The methods that `h5py.File(..., driver="fileobj")` calls to write a new file."""

    def __init__(self) -> None:
        self._position = self._size = 0
        self._writes: list[tuple[int, bytes]] = []

    def writable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the start, the position or the end; return the new position."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = origin[whence] + offset
        return self._position

    def tell(self) -> int:
        """Return the position of the next write."""
        return self._position

    def write(self, data: Any) -> int:
        """Write bytes at the position."""
        self._writes.append((self._position, bytes(data)))
        self._position += len(data)
        self._size = max(self._size, self._position)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        """Set the size."""
        self._size = self._position if size is None else size
        return self._size

    def between(self, start: int, stop: int | None = None) -> bytes:
        """Return the bytes from one offset to another, or to the end; unwritten ones are 0."""
        stop = self._size if stop is None else stop
        found = bytearray(stop - start)
        for offset, data in self._writes:
            first, last = max(start, offset), min(stop, offset + len(data))
            if first < last:
                found[first - start : last - start] = data[first - offset : last - offset]
        return bytes(found)
