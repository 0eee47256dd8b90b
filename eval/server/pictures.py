"""Holds the pictures that the served page may open: its visitors' uploads, and the examples.

The page names a picture by a path, and the path is opened only if the server handed it out. So no
other path leads to a file of the machine, and the answer does not tell which files exist.
"""

import secrets
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workspace.errors import StageError

MAX_UPLOAD_BYTES = 10 * 2**20
"""Of one upload."""
MAX_UPLOADS = 200
MAX_UPLOADS_BYTES = 2**28
"""Of all uploads together."""
MAX_UPLOAD_AGE = 3600.0
"""Seconds. A conversation keeps the features of its picture."""
MAX_NAME = 100
"""Characters of a file name that an error text may repeat."""


class UnknownPictureError(StageError):
    """The page holds no such picture for this visitor."""

    def __init__(self) -> None:
        super().__init__("The server does not have this picture any more. Upload it again.")


@dataclass(frozen=True)
class Upload:
    """A picture that a visitor uploaded."""

    name: str
    visitor: str
    num_bytes: int
    time: float


class PagePictures:
    """The pictures of one server. Several threads may use it."""

    def __init__(self, folder: Path) -> None:
        """Create the folder for uploads."""
        folder.mkdir(mode=0o700)
        self._folder = folder
        self._examples: dict[str, str] = {}
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def add_examples(self, paths: Iterable[Path]) -> None:
        """Allow every visitor to open these files."""
        self._examples |= {str(path): path.name for path in paths}

    def add_upload(self, name: str, data: bytes, visitor: str) -> str:
        """Store a picture, and remove the oldest uploads while there are too many.

        Args:
            name: The file's name or path on the visitor's machine.
            data: The file's bytes, at most `MAX_UPLOAD_BYTES`.
            visitor: Id of the only visitor who may open the picture.

        Returns:
            The picture's path, which nobody can guess.

        Raises:
            OSError: The file cannot be written.
        """
        path = self._folder / secrets.token_hex(16)
        upload = Upload(_base_name(name), visitor, len(data), time.monotonic())
        with self._lock:
            try:
                path.write_bytes(data)
            except OSError:
                path.unlink(missing_ok=True)
                raise
            self._uploads[str(path)] = upload
            while len(self._uploads) > MAX_UPLOADS or self._num_bytes() > MAX_UPLOADS_BYTES:
                self._remove(next(iter(self._uploads)))
        return str(path)

    def read(self, path: str, visitor: str) -> tuple[str, bytes]:
        """Return the name and the bytes of a picture.

        Raises:
            UnknownPictureError: The path was never handed out to this visitor, or was removed.
            StageError: The system cannot read the file.
        """
        with self._lock:
            upload = self._uploads.get(path)
            if upload is not None and upload.visitor == visitor:
                name = upload.name
            elif path in self._examples:
                name = self._examples[path]
            else:
                raise UnknownPictureError
            try:
                return name, Path(path).read_bytes()
            except FileNotFoundError:
                raise UnknownPictureError from None
            except OSError as error:
                raise StageError(f"{name}: cannot be read: {error.strerror}.") from None

    def remove_old(self, now: float) -> None:
        """Remove uploads older than `MAX_UPLOAD_AGE`; `now` is a time of the monotonic clock."""
        with self._lock:
            for path, upload in list(self._uploads.items()):
                if now - upload.time > MAX_UPLOAD_AGE:
                    self._remove(path)

    def _num_bytes(self) -> int:
        return sum(upload.num_bytes for upload in self._uploads.values())

    def _remove(self, path: str) -> None:
        del self._uploads[path]
        Path(path).unlink(missing_ok=True)


def _base_name(name: str) -> str:
    """Return the last part of a POSIX or Windows path, as printable text."""
    base = name.replace("\\", "/").rpartition("/")[2]
    return "".join(filter(str.isprintable, base))[:MAX_NAME] or "picture"
