"""Reads the bytes of images from a folder or straight from a zip, by the names annotations use.

Owns which names are allowed and where they are looked up. Does not decode anything.
"""

import errno
import lzma
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from cache.errors import StageError
from cache.files import naming
from cache.zip_file import open_zip

MAX_IMAGE_BYTES = 256 * 2**20
"""A larger file is refused before it is read: a zip member can claim any size."""

_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
)
"""What zipfile raises on damaged, encrypted or oddly compressed archives."""


FAILING_DISK = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors that say nothing about a file or its name."""


class ImageNameError(ValueError):
    """A file name that points out of the image root, or at nothing that can be read there."""


class ImageArchive:
    """The images of one split: a folder, or a zip that is read in place.

    A zip is opened on first use in each process, because a file position is shared across a fork.
    """

    def __init__(self, path: str | Path, *, key: str) -> None:
        """Check that the images are there.

        Args:
            path: Folder or `.zip`.
            key: The settings key that named it, for the error text.

        Raises:
            StageError: Nothing there, an empty folder, or not a readable zip.
        """
        self.path = Path(path)
        self._owner = 0
        self._zip: zipfile.ZipFile | None = None
        self._members: dict[str, str] = {}
        if self.path.is_dir():
            if not any(self.path.iterdir()):
                raise StageError(f"{key}: {path} is an empty folder, wanted images in it.")
        elif not self.path.exists():
            raise StageError(
                f"{key}: {path} does not exist. Run the fetch stage, or name a folder or a zip "
                f"of images there."
            )
        else:
            self._open_zip(key)

    def _open_zip(self, key: str) -> None:
        try:
            archive = open_zip(self.path)
        except _ZIP_ERRORS as error:
            raise StageError(
                f"{key}: {self.path} is neither a folder nor a readable zip ({error}). "
                f"Fetch it again."
            ) from None
        names = [name for name in archive.namelist() if not name.endswith("/")]
        if not names:
            archive.close()
            raise StageError(f"{key}: {self.path} is an empty zip, wanted images in it.")
        # COCO's zips hold train2017/000000000009.jpg where annotations say 000000000009.jpg.
        for name in names:
            self._members.setdefault(PurePosixPath(name).name, name)
        self._members.update({name: name for name in names})
        self._zip, self._owner = archive, os.getpid()

    def read(self, file_name: str) -> bytes:
        """Return the bytes of one image file.

        Args:
            file_name: As annotations spell it, relative to the image root.

        Raises:
            ImageNameError: The name leaves the image root, is not there, or is too large.
        """
        check_file_name(file_name)
        if self.path.is_dir():
            return self._read_file(self.path / file_name)
        return self._read_member(file_name)

    def _read_file(self, path: Path) -> bytes:
        try:
            if not path.is_file():
                raise ImageNameError(f"no file {path.name!r} in {self.path}")
            if path.stat().st_size > MAX_IMAGE_BYTES:
                raise ImageNameError(f"{path.name!r} has more than {MAX_IMAGE_BYTES} bytes")
            with naming(path):
                return path.read_bytes()
        except OSError as error:
            if error.errno in FAILING_DISK:
                raise
            # A name that the file system cannot hold, or a file that may not be read.
            raise ImageNameError(f"{path.name!r} in {self.path}: {error.strerror}") from None

    def _read_member(self, file_name: str) -> bytes:
        if file_name not in self._members:
            raise ImageNameError(f"no file {file_name!r} in {self.path}")
        if self._zip is None or self._owner != os.getpid():
            self._zip, self._owner = open_zip(self.path), os.getpid()
        member = self._zip.getinfo(self._members[file_name])
        if member.file_size > MAX_IMAGE_BYTES:
            raise ImageNameError(f"{file_name!r} has more than {MAX_IMAGE_BYTES} bytes")
        try:
            return self._zip.read(member)
        except _ZIP_ERRORS as error:
            raise ImageNameError(f"{file_name!r} in {self.path}: {error}") from None

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_zip": None, "_owner": 0}


def check_file_name(file_name: str) -> None:
    """Refuse a name that is not a plain relative path below the image root.

    Raises:
        ImageNameError: Empty, absolute, with `..`, a backslash, a drive or a zero byte.
    """
    path = PurePosixPath(file_name)
    if (
        not file_name
        or path.is_absolute()
        or ".." in path.parts
        or any(mark in file_name for mark in ("\\", "\0", ":"))
    ):
        raise ImageNameError(f"file name {file_name!r} leaves the image root")
