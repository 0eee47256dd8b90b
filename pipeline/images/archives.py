"""The images of a split: a folder or a zip, and the file in it that a name means.

A name means the file of exactly that full name or, if none exists, the only file of that base name
in any folder: COCO's zips hold `train2017/000000000009.jpg` where its annotations say
`000000000009.jpg`, and other data sets do the opposite.
"""

from collections.abc import Sequence
from pathlib import Path

from cache.files.atomic import check_ordinary
from pipeline.images.folder import ImageFolder
from pipeline.images.names import ImageNameError, check_file_name, plain_name
from pipeline.images.zip_file import REMEDY, ImageZip
from workspace.errors import StageError


class ImageArchive:
    """The images of one split: a folder, or a zip that is read in place."""

    def __init__(self, path: str | Path, *, key: str, follow_links: bool = False) -> None:
        """Open the images.

        Args:
            path: The folder or `.zip`.
            key: The settings key that named it, for the error text.
            follow_links: Whether links in a folder may lead out of it.

        Raises:
            StageError: The path does not exist, is empty, or is no readable zip.
        """
        self.path = Path(path)
        check_ordinary(self.path, lambda why: StageError(f"{key}: {path}: {why}. {REMEDY}"))
        self._files: ImageFolder | ImageZip
        if self.path.is_dir():
            self._files = ImageFolder(self.path, key=key, follow_links=follow_links)
        elif self.path.exists():
            self._files = ImageZip(self.path, key=key)
        else:
            raise StageError(
                f"{key}: {path} does not exist. Name a folder or a zip of images there; the "
                f"sources demo and coco make it in the fetch stage."
            )

    def has(self, file_name: str) -> bool:
        """Whether a file has exactly this full name."""
        full_name = plain_name(file_name)
        return bool(full_name) and self._files.has(full_name)

    def names(self, file_name: str) -> Sequence[str]:
        """Return the full names of all files with the base name of `file_name`."""
        return self._files.names(plain_name(file_name).rpartition("/")[2])

    def real_path(self, full_name: str) -> str:
        """Return a file's path with all links resolved, the same for every name of the file.

        Raises:
            ImageNameError: The settings do not allow a link out of the folder.
        """
        return self._files.real_path(full_name)

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

    def _is_same(self, full_name: str, other: str) -> bool:
        try:
            if self.real_path(full_name) == self.real_path(other):
                return True
            return self._files.read(full_name) == self._files.read(other)
        except ImageNameError:
            return False

    def read(self, file_name: str) -> bytes:
        """Return the bytes of the image file that a name means; see `find`.

        Raises:
            ImageNameError: As `find` raises it, or the file cannot be read or is too large.
            StageError: The disk or the machine failed.
        """
        return self._files.read(self.find(file_name))
