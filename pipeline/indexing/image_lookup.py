"""Finds the image files that texts name, among the images of both splits.

Reads a file once, however many names lead to it. Which file gets which id is decided in
`pipeline.indexing.image_collection`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import xxhash

from pipeline.images.archives import ImageArchive
from pipeline.images.decode import DecodeError, image_size
from pipeline.images.names import ImageNameError, check_file_name, plain_name
from pipeline.indexing.records import RecordError
from workspace.data_settings import Split

Content = tuple[int, int]
"""Number of bytes and xxh3 of a file, by which equal files are recognised."""

UNREADABLE = "image missing or unreadable"


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file among the images of a split."""

    split: Split
    root: str
    full_name: str
    real_path: str
    """The path with all links resolved, the same for every name of the file."""

    def __repr__(self) -> str:
        return repr(f"{self.root}/{self.full_name}")


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """The content of a file without its pixels."""

    content: Content | None
    """None if the file cannot be read."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""
    problem: str = ""
    """Why the file is no image; empty if it is one."""


class ImageLookup:
    """The image files of both splits, by the names that texts use."""

    def __init__(self, archives: Mapping[Split, ImageArchive]) -> None:
        self._archives = archives
        self._info: dict[str, ImageInfo] = {}
        self._named: dict[str, list[ImageFile]] = {}

    def find_listed(self, name: str, split: Split) -> ImageFile:
        """Return the file that the captions file of a split lists under a name.

        Raises:
            RecordError: The images of the split hold no such file, or different ones.
        """
        archive = self._archives[split]
        with _name_errors():
            full_name = archive.find(name)
        file = self._file(split, full_name)
        if "/" in plain_name(name) and not archive.has(name):
            # The name includes the folder, which may be among the images of the other split.
            for other in self._exact(name):
                self._check_same(name, file, other)
        return file

    def find_named(self, name: str) -> list[ImageFile]:
        """Return the files that a text means by a name; several only if their bytes are equal.

        Raises:
            RecordError: No file has the name, or different ones have it.
        """
        if name not in self._named:
            self._named[name] = self._search(name)
        return self._named[name]

    def _search(self, name: str) -> list[ImageFile]:
        files = self._exact(name) or [
            self._file(split, full_name)
            for split, archive in self._archives.items()
            for full_name in archive.names(name)
        ]
        if not files:
            roots = " or ".join(archive.path for archive in self._archives.values())
            raise RecordError(f"{UNREADABLE}: no file {name!r} in {roots}")
        for other in files[1:]:
            self._check_same(name, files[0], other)
        return files

    def _exact(self, name: str) -> list[ImageFile]:
        """Return the files of exactly this full name, at most one of each split."""
        return [
            self._file(split, plain_name(name))
            for split, archive in self._archives.items()
            if archive.has(name)
        ]

    def _file(self, split: Split, full_name: str) -> ImageFile:
        archive = self._archives[split]
        with _name_errors():
            return ImageFile(split, archive.path, full_name, archive.real_path(full_name))

    def _check_same(self, name: str, file: ImageFile, other: ImageFile) -> None:
        """Refuse a name that two different files have."""
        if file.real_path == other.real_path:
            return
        content = self.info(file).content
        if content is None or content != self.info(other).content:
            raise RecordError(f"image name ambiguous: {name!r} may be {file!r} or {other!r}")

    def info(self, file: ImageFile) -> ImageInfo:
        """Return content and size of a file, which is read at the first call."""
        if file.real_path not in self._info:
            self._info[file.real_path] = self._read(file)
        return self._info[file.real_path]

    def _read(self, file: ImageFile) -> ImageInfo:
        try:
            check_file_name(file.full_name)
            data = self._archives[file.split].read(file.full_name)
        except ImageNameError as error:
            return ImageInfo(None, problem=f"{UNREADABLE}: {error}")
        content = (len(data), xxhash.xxh3_64_intdigest(data))
        try:
            return ImageInfo(content, image_size(data))
        except DecodeError as error:
            return ImageInfo(content, problem=f"not an image: {error}")


@contextlib.contextmanager
def _name_errors() -> Iterator[None]:
    try:
        yield
    except ImageNameError as error:
        raise RecordError(f"{UNREADABLE}: {error}") from None
