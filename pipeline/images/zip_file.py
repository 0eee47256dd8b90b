"""Opens a zip so that a disk that fails is not taken for a damaged zip.

`zipfile` catches the OSErrors of reading and raises BadZipFile in their place.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.errors import PatchcacheError


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip for reading; what it raises on a damaged one is `zipfile`'s.

    Raises:
        OSError: It cannot be opened.
        PatchcacheError: Now or later, the system cannot read it.
    """
    return _Zip(io.BufferedReader(_Reader(path)))


class _Zip(zipfile.ZipFile):
    """A zip that closes its file, which `zipfile` leaves to whoever opened it."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        try:
            super().__init__(file)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._file.close()


class _Reader(io.FileIO):
    """A file whose read errors are no OSErrors, by whatever method it is read."""

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer, as `io.FileIO` does."""
        with self._failing_plainly():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """Read to the end, as `io.FileIO` does."""
        with self._failing_plainly():
            return super().readall()

    @contextlib.contextmanager
    def _failing_plainly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PatchcacheError(
                f"{self.name!s}: {error.strerror}. Look after the disk."
            ) from None

    def __del__(self) -> None:
        """Close the file with the last zip that reads it, as `zipfile` does with its own."""
        self.close()
