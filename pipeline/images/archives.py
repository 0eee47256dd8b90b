"""Where image files lie: below a folder, or in a zip that is read in place.

Owns what can be read at all. A file's full name is its path below the folder or in the zip, with
`/` between folders; which full name a text means is for `pipeline.images.names`.
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
"""A larger file is refused before it is read: a zip member can claim any size."""

REMEDY = "Replace it, or name another there; the sources demo and coco make it in the fetch stage."

_ERRORS_OF_NAMES = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    # Of a damaged zip, which says that a member stands before its beginning.
    errno.EINVAL,
}
"""What the system says of one file; its other errors are about the disk or the machine."""


class ImageNameError(PatchcacheError, ValueError):
    """A file name that points out of the image root, or at nothing that can be read there."""


class ImageFolder:
    """The image files below a folder, which may itself be a link."""

    def __init__(self, path: Path, *, key: str, follow_links: bool) -> None:
        """Check that the folder holds something.

        Args:
            path: The folder.
            key: The settings key that named it, for the error text.
            follow_links: Whether links may lead out of the folder.

        Raises:
            StageError: An empty folder, or one that cannot be listed.
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
        """Whether there is a file of this name, be it reached through a link that leads out."""
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
            # A folder that may not be listed, like a disk's lost+found.
            return []

    def _must_enter(self, folder: str, seen: set[Path]) -> bool:
        """Whether the files of a folder have no other name yet; `seen` ends circles of links."""
        path = self._root / folder
        real = Path(os.path.realpath(path))
        if path.is_symlink() and (real.is_relative_to(self._root) or not self._follow_links):
            return False
        is_new = real not in seen
        seen.add(real)
        return is_new

    def place(self, full_name: str) -> str:
        """Return the path that a file has without links: two names of one file have one place.

        Raises:
            ImageNameError: A link leads out of the folder, which the settings do not allow.
        """
        folder, _, base_name = full_name.rpartition("/")
        # A look at each file instead of at each folder above it.
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
            ImageNameError: It leads out of the folder, cannot be read, or is too large.
            StageError: The system failed.
        """
        path = Path(self.place(full_name))
        where = f"{full_name!r} in {self.path}"
        with _reading(lambda reason: ImageNameError(f"{where}: {reason}"), where):
            status = path.stat()
            # A pipe would keep the reader waiting for ever.
            if not stat.S_ISREG(status.st_mode):
                raise ImageNameError(f"{where} is no ordinary file")
            _check_size(full_name, status.st_size)
            return path.read_bytes()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_names": None}


class ImageZip:
    """The image files in a zip; it is opened anew in each process, whose file position it is."""

    def __init__(self, path: Path, *, key: str) -> None:
        """Open the zip.

        Args:
            path: The file.
            key: The settings key that named it, for the error text.

        Raises:
            StageError: Not a readable zip, or an empty one.
        """
        self.path = path
        self._real_path = os.path.realpath(path)
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
        """Whether there is a file of this name."""
        self._open()
        return full_name in self._members

    def names(self, base_name: str) -> Sequence[str]:
        """Return the full names of all files with this base name, in all folders."""
        self._open()
        return sorted(self._names.get(base_name, ()))

    def place(self, full_name: str) -> str:
        """Return what no other file has: the zip's path without links, and the full name."""
        return f"{self._real_path}/{full_name}"

    def read(self, full_name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            ImageNameError: It is a link or damaged, too large, or two entries differ.
            StageError: The system failed.
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
    """Return a relative path as unpacking would write it: without empty, `.` and `..` parts."""
    parts = path.split("/")
    return "/".join([part for part in parts if part not in ("", ".", "..")])


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # A link in a circle is no folder; entry.is_dir() would raise.
    return Path(entry).is_dir() if entry.is_symlink() else entry.is_dir()


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        raise ImageNameError(f"{name!r} has more than {MAX_IMAGE_BYTES} bytes")


@contextlib.contextmanager
def _reading(refuse: Callable[[str], PatchcacheError], where: str) -> Iterator[None]:
    """Tell a file that cannot be read from a disk that fails."""
    try:
        with reading_foreign_file(refuse):
            yield
    except OSError as error:
        if error.errno in _ERRORS_OF_NAMES:
            raise refuse(str(error.strerror)) from None
        raise StageError(
            f"{where} cannot be read: {error.strerror}. Nothing is known about the file; mend "
            f"what the system complains of, and run again."
        ) from None
