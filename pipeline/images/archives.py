"""The images of a split: one or several places, and the file there that a name means.

A name means the file of exactly that full name or, if none exists, the only file of that base name
in any folder: COCO's zips hold `train2017/000000000009.jpg` where its annotations say
`000000000009.jpg`, and other data sets do the opposite. A file's full name is the prefix of its
place, then its path there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cache.files.atomic import check_ordinary
from pipeline.images.folder import ImageFolder
from pipeline.images.names import ImageNameError, check_file_name, plain_name
from pipeline.images.zip_file import REMEDY, ImageZip
from workspace.data_settings import ImagePath
from workspace.errors import StageError


class ImageFiles(Protocol):
    """The files in one place. A copy in another process opens the place anew."""

    def has(self, name: str) -> bool:
        """Whether a file has exactly this path."""

    def names(self, base_name: str) -> Sequence[str]:
        """Return the paths of all files with this base name, in all folders, sorted."""

    def all_names(self) -> Sequence[str]:
        """Return the paths of all files, sorted."""

    def real_path(self, name: str) -> str:
        """Return a file's place with all links resolved, the same for every name of the file.

        Raises:
            ImageNameError: The settings do not allow a link out of the folder.
        """

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            ImageNameError: The file cannot be read, or is too large.
            StageError: The disk, the network or the machine failed.
        """


@dataclass(frozen=True)
class _Place:
    """The files of one place under their full names."""

    path: str
    prefix: str
    """Empty, or folders that end in `/`."""
    files: ImageFiles


class ImageArchive:
    """The images of one split, each read where it is."""

    def __init__(self, paths: Sequence[ImagePath], *, key: str, follow_links: bool = False) -> None:
        """Open the images.

        Args:
            paths: Where they are.
            key: The settings key that named them, for the error text.
            follow_links: Whether links in a folder may lead out of it.

        Raises:
            StageError: A path does not exist, is empty, or cannot be read.
        """
        self._places = [
            _Place(item.path, plain_name(item.prefix) + "/" if item.prefix else "", files)
            for item in paths
            for files in open_files(item.path, key, follow_links)
        ]
        self.path = ", ".join(item.path for item in paths)
        """All places, for error texts."""

    def has(self, file_name: str) -> bool:
        """Whether a file has exactly this full name."""
        return any(self._holders(plain_name(file_name)))

    def names(self, file_name: str) -> list[str]:
        """Return the full names of all files with the base name of `file_name`."""
        base_name = plain_name(file_name).rpartition("/")[2]
        names = (p.prefix + name for p in self._places for name in p.files.names(base_name))
        return list(dict.fromkeys(names))

    def all_names(self) -> list[str]:
        """Return the full names of all files, place by place."""
        names = (p.prefix + name for p in self._places for name in p.files.all_names())
        return list(dict.fromkeys(names))

    def real_path(self, full_name: str) -> str:
        """Return a file's path with all links resolved, the same for every name of the file.

        Raises:
            ImageNameError: The settings do not allow a link out of the folder, or two places hold
                different files of this name.
        """
        files, name = self._only_holder(full_name)
        return files.real_path(name)

    def find(self, file_name: str) -> str:
        """Return the full name of the file that a name in the annotations means.

        Raises:
            ImageNameError: The name leaves the image root, or means no file or different ones.
            StageError: The disk or the machine failed.
        """
        check_file_name(file_name)
        if self.has(file_name):
            return plain_name(file_name)
        names = self.names(file_name)
        if not names:
            raise ImageNameError(f"no file {file_name!r} in {self.path}")
        for other in names[1:]:
            if not self._is_same(names[0], other):
                raise ImageNameError(
                    f"{file_name!r} may be {names[0]!r} or {other!r} in {self.path}"
                )
        return names[0]

    def read(self, file_name: str) -> bytes:
        """Return the bytes of the image file that a name means; see `find`.

        Raises:
            ImageNameError: As `find` raises it, or the file cannot be read or is too large.
            StageError: The disk or the machine failed.
        """
        files, name = self._only_holder(self.find(file_name))
        return files.read(name)

    def _holders(self, full_name: str) -> Iterator[tuple[_Place, str]]:
        """Yield the places with a file of this full name, and its path there."""
        for place in self._places:
            name = full_name.removeprefix(place.prefix)
            if name and full_name.startswith(place.prefix) and place.files.has(name):
                yield place, name

    def _only_holder(self, full_name: str) -> tuple[ImageFiles, str]:
        """Return the files of the place that holds a full name; of equal files, the first."""
        (first, name), *others = self._holders(full_name)
        for other, other_name in others:
            same_path = first.files.real_path(name) == other.files.real_path(other_name)
            if not same_path and first.files.read(name) != other.files.read(other_name):
                raise ImageNameError(
                    f"{full_name!r} is one file in {first.path} and another in {other.path}; a "
                    f"prefix tells them apart"
                )
        return first.files, name

    def _is_same(self, full_name: str, other: str) -> bool:
        try:
            if self.real_path(full_name) == self.real_path(other):
                return True
            return self.read(full_name) == self.read(other)
        except ImageNameError:
            return False


def open_files(path: str, key: str, follow_links: bool) -> list[ImageFiles]:
    """Open the files of a path; a pattern gives several places.

    Raises:
        StageError: The path does not exist, is empty, or cannot be read.
    """
    local = Path(path)
    check_ordinary(local, lambda why: StageError(f"{key}: {path}: {why}. {REMEDY}"))
    if local.is_dir():
        return [ImageFolder(local, key=key, follow_links=follow_links)]
    if local.exists():
        return [ImageZip(local, key=key)]
    raise StageError(
        f"{key}: {path} does not exist. Name a folder or a zip of images there; the sources demo "
        f"and coco make it in the fetch stage."
    )
