"""A file that is hashed while it is written, so that its sha256 costs no second pass."""

import hashlib
import io
from pathlib import Path

from ..errors import CorruptShardError
from .atomic import sha256_of


class HashedFile(io.BufferedWriter):
    """A new file whose bytes are hashed while they are written.

    Some file systems of fsspec write into a file object, others open a path: it is both. What was
    not written through it is hashed afterwards.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Create the file.

        Args:
            path: Of the file.
            most_bytes: How many may be written.
        """
        super().__init__(io.FileIO(path, "wb"))
        self._path = path
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._digest = hashlib.sha256()

    def __fspath__(self) -> str:
        return str(self._path)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write bytes and hash them.

        Raises:
            CorruptShardError: There are more than there may be.
            OSError: They cannot be stored; names the file.
        """
        self._num_bytes += len(data)
        if self._num_bytes > self._most_bytes:
            raise CorruptShardError(f"more than {self._most_bytes} bytes came")
        try:
            written = super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self._digest.update(data)
        return written

    def finish(self) -> tuple[int, str]:
        """Close the file and return how many bytes it has, and their sha256 in hexadecimal."""
        self.close()
        num_bytes = self._path.stat().st_size
        if num_bytes != self._num_bytes:
            return num_bytes, sha256_of(self._path)
        return num_bytes, self._digest.hexdigest()
