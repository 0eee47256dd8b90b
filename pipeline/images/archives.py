"""The image files below a folder, or in a zip that is read in place.

Decides what can be read at all. A file's full name is its path below the folder or in the zip, with
`/` between folders; which full name a text means is decided in `pipeline.images.names`.
"""

import contextlib
import errno
import os
import stat
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cache.errors import PatchcacheError
from cache.files.foreign import reading_foreign_file
from pipeline.images.zip_file import open_zip
from workspace.errors import StageError

MAX_IMAGE_BYTES = 256 * 2**20
"""Limit of an image file, checked before it is read: a zip member can claim any size."""

REMEDY = "Replace it, or name another there; the sources demo and coco make it in the fetch stage."

_FILE_ERRNOS = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    # A damaged zip can place a member before the start of the file.
    errno.EINVAL,
}
"""System errors that concern one file; all others concern the disk or the machine."""


class ImageNameError(PatchcacheError, ValueError):
    """A file name that leaves the image root, or names nothing there that can be read."""


class ImageFolder:
    """The image files below a folder, which may itself be a link."""

    def __init__(self, path: Path, *, key: str, follow_links: bool) -> None:
        """Check that the folder is not empty.

        Args:
            path: The folder.
            key: The settings key that named it, for the error text.
            follow_links: Whether links may lead out of the folder.

        Raises:
            StageError: The folder is empty or cannot be listed.
        """
        with _reading(lambda reason: StageError(f"{key}: {path}: {reason}."), f"{key}: {path}"):
            if not any(path.iterdir()):
                raise StageError(f"{key}: {path} is an empty folder, wanted images in it.")
        self.path = path
        self._follow_links = follow_links
        self._root = Path(os.path.realpath(path))
        self._real_folders: dict[str, Path] = {}
        self._names: dict[str, list[str]] | None = None

    def has(self, full_name: str) -> bool:
        """Whether a file of this name exists, even one that a link outside the folder leads to."""
        path = self._root / full_name
        try:
            with _reading(ImageNameError, str(path)):
                return stat.S_ISREG(path.stat().st_mode)
        except ImageNameError:
            return False

    def names(self, base_name: str) -> Sequence[str]:
        """Return the full names of all files with this base name, in all folders."""
        if self._names is None:
            self._names = self._walk()
        return self._names.get(base_name, ())

    def _walk(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = defaultdict(list)
        waiting, seen = [""], {self._root}
        while waiting:
            folder = waiting.pop()
            for name, is_folder in self._entries(folder):
                full_name = f"{folder}/{name}" if folder else name
                if not is_folder:
                    names[name].append(full_name)
                elif self._must_enter(full_name, seen):
                    waiting.append(full_name)
        return {name: sorted(found) for name, found in names.items()}

    def _entries(self, folder: str) -> list[tuple[str, bool]]:
        path = self._root / folder
        try:
            with _reading(ImageNameError, str(path)), os.scandir(path) as entries:
                return [(entry.name, _is_folder(entry)) for entry in entries]
        except ImageNameError:
            # No permission to list the folder, as with a disk's lost+found.
            return []

    def _must_enter(self, folder: str, seen: set[Path]) -> bool:
        """Whether a folder's files were not listed yet; `seen` breaks cycles of links."""
        path = self._root / folder
        real = Path(os.path.realpath(path))
        if path.is_symlink() and (real.is_relative_to(self._root) or not self._follow_links):
            return False
        is_new = real not in seen
        seen.add(real)
        return is_new

    def real_path(self, full_name: str) -> str:
        """Return a file's path with all links resolved, the same for every name of the file.

        Raises:
            ImageNameError: A link leads out of the folder, which the settings do not allow.
        """
        folder, _, base_name = full_name.rpartition("/")
        # Cached by folder: otherwise every file costs a system call per folder above it.
        if folder not in self._real_folders:
            self._real_folders[folder] = Path(os.path.realpath(self._root / folder))
        path = self._real_folders[folder] / base_name
        if path.is_symlink():
            path = Path(os.path.realpath(path))
        if not (self._follow_links or path.is_relative_to(self._root)):
            raise ImageNameError(
                f"file name {full_name!r} leaves the image root by a link to {str(path)!r}, which "
                f"only data.follow_links: true allows"
            )
        return str(path)

    def read(self, full_name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            ImageNameError: The file is outside the folder, cannot be read, or is too large.
            StageError: The disk or the machine failed.
        """
        path = Path(self.real_path(full_name))
        where = f"{full_name!r} in {self.path}"
        with _reading(lambda reason: ImageNameError(f"{where}: {reason}"), where):
            status = path.stat()
            # Reading a pipe would block for ever.
            if not stat.S_ISREG(status.st_mode):
                raise ImageNameError(f"{where} is no ordinary file")
            _check_size(full_name, status.st_size)
            return path.read_bytes()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_names": None}


class ImageZip:
    """The image files in a zip, opened anew in each process because a file has one position."""

    def __init__(self, path: Path, *, key: str) -> None:
        """Open the zip.

        Args:
            path: The file.
            key: The settings key that named it, for the error text.

        Raises:
            StageError: The zip cannot be read, or is empty.
        """
        self.path = path
        self._zip_path = os.path.realpath(path)
        self._key = key
        self._owner = 0
        self._open()
        if not self._members:
            raise StageError(f"{key}: {path} is an empty zip, wanted images in it.")

    def _open(self) -> None:
        if self._owner == os.getpid():
            return
        with _reading(self._unreadable, f"{self._key}: {self.path}"):
            self._zip = open_zip(self.path)
        self._owner = os.getpid()
        self._members: dict[str, list[zipfile.ZipInfo]] = defaultdict(list)
        self._names: dict[str, list[str]] = defaultdict(list)
        for member in self._zip.infolist():
            if not member.is_dir():
                self._add(member)

    def _unreadable(self, reason: str) -> StageError:
        return StageError(
            f"{self._key}: {self.path} is neither a folder nor a readable zip ({reason}). {REMEDY}"
        )

    def _add(self, member: zipfile.ZipInfo) -> None:
        full_name = plain_name(member.filename)
        if full_name not in self._members:
            self._names[full_name.rpartition("/")[2]].append(full_name)
        self._members[full_name].append(member)

    def has(self, full_name: str) -> bool:
        """Whether a file of this name exists."""
        self._open()
        return full_name in self._members

    def names(self, base_name: str) -> Sequence[str]:
        """Return the full names of all files with this base name, in all folders."""
        self._open()
        return sorted(self._names.get(base_name, ()))

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
        first, *others = self._members[full_name]
        data = self._read(first)
        if any(self._read(other) != data for other in others):
            raise ImageNameError(f"{full_name!r} stands twice in {self.path}, with other bytes")
        return data

    def _read(self, member: zipfile.ZipInfo) -> bytes:
        where = f"{member.filename!r} in {self.path}"
        _check_size(member.filename, member.file_size)
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ImageNameError(f"{where} is a link, and links in a zip are not followed")
        with _reading(lambda reason: ImageNameError(f"{where}: {reason}"), where):
            return self._zip.read(member)

    def __getstate__(self) -> dict[str, object]:
        state = self.__dict__.copy()
        for name in ("_zip", "_members", "_names"):
            del state[name]
        return state | {"_owner": 0}


def plain_name(path: str) -> str:
    """Return a relative path as `unzip` would write it: without empty, `.` and `..` parts."""
    parts = path.split("/")
    return "/".join([part for part in parts if part not in ("", ".", "..")])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # entry.is_dir() raises for a cycle of links.
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise ImageNameError(f"{name!r} has more than {MAX_IMAGE_BYTES} bytes")


@contextlib.contextmanager
def _reading(refuse: Callable[[str], PatchcacheError], where: str) -> Iterator[None]:
    """Distinguish a file that cannot be read from a disk that fails."""
    try:
        with reading_foreign_file(refuse):
            yield
    except OSError as error:
        if error.errno in _FILE_ERRNOS:
            raise refuse(str(error.strerror)) from None
        raise StageError(
            f"{where} cannot be read: {error.strerror}. Nothing is known about the file; mend "
            f"what the system complains of, and run again."
        ) from None
