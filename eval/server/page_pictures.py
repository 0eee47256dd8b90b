"""Holds the pictures that the served page may open: uploads of its visitors, and the examples.

A picture is asked for by its path, which is looked up among the paths that were handed out and is
opened only if it is one of them. So no spelling of another path leads to a file of the machine,
and nothing in the answer depends on which files there are.
"""

import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workspace.errors import StageError

MAX_UPLOAD_BYTES = 10 * 2**20
"""Of one picture."""
MAX_UPLOADS = 200
MAX_UPLOADS_BYTES = 2**28
"""Of all uploads together."""
MAX_UPLOAD_AGE = 3600.0
"""Seconds; the features of the picture stay with its conversation."""
MAX_NAME = 100
"""Characters of a file name that an error repeats."""


class UnknownPictureError(StageError):
    """A picture that the page does not hold, or holds for another visitor."""

    def __init__(self) -> None:
        super().__init__("This picture is not on the page, or no longer. Upload it again.")


@dataclass(frozen=True)
class PictureFile:
    """A file that was handed out, under the name that the visitor knows it by."""

    path: Path
    name: str


@dataclass(frozen=True)
class Upload(PictureFile):
    """A picture of a visitor."""

    visitor: str
    num_bytes: int
    time: float


class PagePictures:
    """The pictures of one server, to be used by several threads."""

    def __init__(self, folder: Path) -> None:
        """Create the folder in which the uploads lie."""
        folder.mkdir(mode=0o700)
        self._folder = folder
        self._examples: dict[str, PictureFile] = {}
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def add_examples(self, paths: Iterable[Path]) -> None:
        """Let every visitor open these files."""
        self._examples |= {str(path): PictureFile(path, path.name) for path in paths}

    def add_upload(self, name: str, data: bytes, visitor: str) -> str:
        """Store a picture for a visitor, and remove the oldest uploads that exceed the bounds.

        Args:
            name: Of the file, as the visitor's machine calls it.
            data: Its bytes, at most `MAX_UPLOAD_BYTES`.
            visitor: Who alone may open it.

        Returns:
            The path by which it is asked for; nobody can guess it.

        Raises:
            OSError: It cannot be written.
        """
        path = self._folder / secrets.token_hex(16)
        upload = Upload(path, _base_name(name), visitor, len(data), time.monotonic())
        with self._lock:
            try:
                path.write_bytes(data)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            self._uploads[str(path)] = upload
            while self._exceeds_bounds():
                self._remove(next(iter(self._uploads)))
        return str(path)

    def read(self, path: str, visitor: str) -> tuple[str, bytes]:
        """Return the name and the bytes of a picture; it is not removed meanwhile.

        Raises:
            UnknownPictureError: The path was not handed out to this visitor, or is no longer.
            StageError: The system cannot read the file.
        """
        with self._lock:
            file = self._examples.get(path) or self._uploads.get(path)
            if file is None or (isinstance(file, Upload) and file.visitor != visitor):
                raise UnknownPictureError
            try:
                return file.name, file.path.read_bytes()
            except FileNotFoundError:
                raise UnknownPictureError from None
            except OSError as error:
                raise StageError(f"{file.name}: cannot be read: {error.strerror}.") from None

    def remove_old(self, now: float) -> None:
        """Remove the uploads that are older than `MAX_UPLOAD_AGE` at a time of the monotonic
        clock.
        """
        with self._lock:
            for path, upload in list(self._uploads.items()):
                if now - upload.time > MAX_UPLOAD_AGE:
                    self._remove(path)

    def _exceeds_bounds(self) -> bool:
        num_bytes = sum(upload.num_bytes for upload in self._uploads.values())
        return len(self._uploads) > MAX_UPLOADS or num_bytes > MAX_UPLOADS_BYTES

    def _remove(self, path: str) -> None:
        self._uploads.pop(path).path.unlink(missing_ok=True)


def _base_name(name: str) -> str:
    """Return the last part of a path of whatever system, as printable text."""
    base = name.replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, base))[:MAX_NAME] or "picture"
