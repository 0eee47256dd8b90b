"""Finds the image files that texts name, among the images of both splits.

Reads a file once, however many names lead to it. What gets which id is for
`pipeline.indexing.image_collection`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from pipeline.images.archives import plain_name
from pipeline.images.decode import DecodeError, image_size
from pipeline.images.names import ImageArchive, ImageNameError, check_file_name
from pipeline.indexing.records import RecordError

Split = Literal["train", "val"]

Content = tuple[int, int]
"""Number of bytes and xxh3 of a file: what equal files have in common."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file among the images of a split."""

    split: Split
    root: Path
    full_name: str
    place: str
    """The same whatever name led to the file."""

    def __repr__(self) -> str:
        return repr(f"{self.root}/{self.full_name}")


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What is known of a file without its pixels."""

    content: Content | None
    """None if the file cannot be read."""
    size: tuple[int, int] = (0, 0)
    """Width and height in pixels."""
    problem: str = ""
    """Why the file is no image, or empty."""


class ImageLookup:
    """The image files of both splits, by the names that texts use."""

    def __init__(self, archives: Mapping[Split, ImageArchive]) -> None:
        self._archives = archives
        self._headers: dict[str, ImageHeader] = {}
        self._named: dict[str, list[ImageFile]] = {}

    def listed(self, name: str, split: Split) -> ImageFile:
        """Return the file that the captions file of a split lists under a name.

        Raises:
            RecordError: There is none among the images of the split, or there are several.
        """
        try:
            full_name = self._archives[split].find(name)
        except ImageNameError as error:
            raise RecordError(f"image missing or unreadable: {error}") from None
        file = self._file(split, full_name)
        if "/" in name and not self._archives[split].has(name):
            # A name with a folder says where the file is, be it among the images of another split.
            for other in self._exactly(name):
                self.refuse_different(name, file, other)
        return file

    def named(self, name: str) -> list[ImageFile]:
        """Return the files that a text means by a name: more than one if all are equal.

        Raises:
            RecordError: There is none, or there are different ones.
        """
        if name not in self._named:
            self._named[name] = self._look_for(name)
        return self._named[name]

    def _look_for(self, name: str) -> list[ImageFile]:
        found = self._exactly(name) or [
            self._file(split, full_name)
            for split, archive in self._archives.items()
            for full_name in archive.names(name)
        ]
        if not found:
            places = " or ".join(str(archive.path) for archive in self._archives.values())
            raise RecordError(f"image missing or unreadable: no file {name!r} in {places}")
        for other in found[1:]:
            self.refuse_different(name, found[0], other)
        return found

    def _exactly(self, name: str) -> list[ImageFile]:
        # As unpacking would write it: `./a.jpg` and `a.jpg` are one file.
        full_name = plain_name(name)
        archives = self._archives.items()
        return [self._file(split, full_name) for split, archive in archives if archive.has(name)]

    def _file(self, split: Split, full_name: str) -> ImageFile:
        archive = self._archives[split]
        try:
            return ImageFile(split, archive.path, full_name, archive.place(full_name))
        except ImageNameError as error:
            raise RecordError(f"image missing or unreadable: {error}") from None

    def refuse_different(self, name: str, file: ImageFile, other: ImageFile) -> None:
        """Refuse a name that may mean either of two files.

        Raises:
            RecordError: They differ.
        """
        if not self.is_same(file, other):
            raise RecordError(f"image name ambiguous: {name!r} may be {file!r} or {other!r}")

    def is_same(self, file: ImageFile, other: ImageFile) -> bool:
        """Whether two files are one, or have the same bytes."""
        if file.place == other.place:
            return True
        content = self.header(file).content
        return content is not None and content == self.header(other).content

    def header(self, file: ImageFile) -> ImageHeader:
        """Return what a file is, which is read at the first call."""
        if file.place not in self._headers:
            self._headers[file.place] = self._read(file)
        return self._headers[file.place]

    def _read(self, file: ImageFile) -> ImageHeader:
        try:
            check_file_name(file.full_name)
            data = self._archives[file.split].read(file.full_name)
        except ImageNameError as error:
            return ImageHeader(None, problem=f"image missing or unreadable: {error}")
        content = (len(data), xxhash.xxh3_64_intdigest(data))
        try:
            return ImageHeader(content, image_size(data))
        except DecodeError as error:
            return ImageHeader(content, problem=f"not an image: {error}")
