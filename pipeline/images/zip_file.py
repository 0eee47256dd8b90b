"""Opens a zip so that a failing disk is not taken for a damaged zip.

`zipfile` catches the OSErrors of reading and raises BadZipFile instead.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.errors import PatchcacheError


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip for reading; a damaged one raises the errors of `zipfile`.

    Raises:
        OSError: The file cannot be opened.
        PatchcacheError: The system cannot read the file, now or later.
    """
    return _Zip(io.BufferedReader(_Reader(path)))


class _Zip(zipfile.ZipFile):
    """A zip that closes its file, which `zipfile` does only for files that it opened."""

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
    """A file whose read errors are PatchcacheErrors, whichever method reads it."""

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer, as `io.FileIO` does."""
        with self._converting_errors():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """Read to the end, as `io.FileIO` does."""
        with self._converting_errors():
            return super().readall()

    @contextlib.contextmanager
    def _converting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PatchcacheError(
                f"{self.name!s}: {error.strerror}. Look after the disk."
            ) from None

    def __del__(self) -> None:
        """Close the file together with its last zip, as `zipfile` does with its own files."""
        self.close()
