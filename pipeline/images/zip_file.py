"""The image files in a zip, which is read in place.

`open_zip` keeps a failing disk from being taken for a damaged zip: `zipfile` catches the OSErrors
of reading and raises BadZipFile instead.
"""

import os
import stat
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from pipeline.images.byte_file import ByteFile, LocalFile
from pipeline.images.names import (
    ImageNameError,
    by_base_name,
    check_size,
    is_visible,
    plain_name,
    read_repeated,
    reading_image,
)
from workspace.errors import StageError

REMEDY = "Replace it, or name another."


def open_zip(file: Path | ByteFile) -> zipfile.ZipFile:
    """Open a zip for reading; a damaged one raises the errors of `zipfile`.

    Raises:
        OSError: The file cannot be opened.
        PatchcacheError: The system or the network cannot read the file, now or later.
    """
    return _Zip((LocalFile(file) if isinstance(file, Path) else file).open())


class _Zip(zipfile.ZipFile):
    """A zip that closes its file, which `zipfile` does only for files that it opened."""

    def __init__(self, file: BinaryIO) -> None:
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


class ImageZip:
    """The image files in a zip, opened anew in each process because a file has one position."""

    def __init__(self, file: ByteFile, *, key: str) -> None:
        """Open the zip; errors name the settings key.

        Raises:
            StageError: The zip cannot be read, or is empty.
        """
        self._file = file
        self.path = file.address
        self._zip_path = file.real_path
        self._key = key
        self._owner = 0
        self._open()
        if not self._members:
            raise StageError(f"{key}: {self.path} is an empty zip, wanted images in it.")

    def _open(self) -> None:
        if self._owner == os.getpid():
            return

        def refuse(reason: str) -> StageError:
            return StageError(
                f"{self._key}: {self.path} is neither a folder nor a readable zip ({reason}). "
                f"{REMEDY}"
            )

        with reading_image(refuse, f"{self._key}: {self.path}"):
            self._zip = open_zip(self._file)
        self._owner = os.getpid()
        self._names: dict[str, list[str]] | None = None
        self._members: dict[str, list[zipfile.ZipInfo]] = defaultdict(list)
        for member in self._zip.infolist():
            if not member.is_dir():
                full_name = plain_name(member.filename)
                self._members[full_name].append(member)

    def has(self, full_name: str) -> bool:
        """Whether a file of this name exists."""
        self._open()
        return full_name in self._members

    def names(self, base_name: str) -> Sequence[str]:
        """Return the full names of all files with this base name, in all folders."""
        self._open()
        if self._names is None:
            self._names = by_base_name(self._members)
        return self._names.get(base_name, ())

    def all_names(self) -> list[str]:
        """Return the full names of all files, but for hidden ones, sorted."""
        self._open()
        return sorted(filter(is_visible, self._members))

    def real_path(self, full_name: str) -> str:
        """Return the zip's path with all links resolved, followed by the full name."""
        return f"{self._zip_path}/{full_name}"

    def read(self, full_name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            ImageNameError: The file is a link, damaged, or too large, or two entries differ.
            StageError: The disk or the machine failed.
        """
        self._open()
        return read_repeated(self._members[full_name], self._read, full_name, self.path)

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        where = f"{member.filename!r} in {self.path}"
        check_size(member.filename, member.file_size)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ImageNameError(f"{where} is a link, and links in a zip are not followed")
        with reading_image(lambda reason: ImageNameError(f"{where}: {reason}"), where):
            return self._zip.read(member)

    def __getstate__(self) -> dict[str, object]:
        opened = ("_zip", "_members", "_names")
        kept = {name: value for name, value in self.__dict__.items() if name not in opened}
        return kept | {"_owner": 0}
