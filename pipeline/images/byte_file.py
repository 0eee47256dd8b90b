"""A file of known size whose bytes are read by their offset, on this machine or behind a URL."""

import contextlib
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from cache.errors import PatchcacheError, UnreachableStoreError
from cache.remote.network import attempt
from cache.remote.urls import WEB, filesystem_of
from workspace.errors import StageError

BUFFER_BYTES = 1 << 18
"""Bytes of a request to a server, unless more are wanted: about an image of COCO."""

Result = TypeVar("Result")


class ByteFile(Protocol):
    """A file that holds images. A copy in another process opens the file anew."""

    address: str
    """Path or URL, for error texts."""

    @property
    def name(self) -> str:
        """The last part of the address."""

    @property
    def real_path(self) -> str:
        """The path with all links resolved, or the URL."""

    def size(self) -> int:
        """Return the number of bytes."""

    def read_at(self, start: int, num_bytes: int) -> bytes:
        """Return bytes from an offset on; fewer where the file ends.

        Raises:
            OSError: The file cannot be read.
            StageError: The network failed.
        """

    def open(self, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        """Return a stream from the start of the file, which the caller closes.

        Raises:
            OSError: The file cannot be opened.
            PatchcacheError: Also from the stream's methods: the disk or the network failed.
        """


class LocalFile:
    """A file on this machine, opened for each read: a thousand shards need no thousand files."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is read yet."""
        self.path = path
        self.address = str(path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    @property
    def real_path(self) -> str:
        """The path with all links resolved."""
        return os.path.realpath(self.path)

    def size(self) -> int:
        """Return the number of bytes."""
        return self.path.stat().st_size

    def read_at(self, start: int, num_bytes: int) -> bytes:
        """Return bytes from an offset on; fewer where the file ends.

        Raises:
            OSError: The file cannot be read.
        """
        with self.path.open("rb", buffering=0) as file:
            pieces = []
            while num_bytes and (piece := os.pread(file.fileno(), num_bytes, start)):
                pieces.append(piece)
                start, num_bytes = start + len(piece), num_bytes - len(piece)
        return b"".join(pieces)

    def open(self, buffer_bytes: int = io.DEFAULT_BUFFER_SIZE) -> BinaryIO:
        """Return a stream from the start of the file, which the caller closes.

        Raises:
            OSError: The file cannot be opened.
            PatchcacheError: Also from the stream's methods: the system cannot read the file.
        """
        return io.BufferedReader(LocalReader(self.path), buffer_bytes)


class LocalReader(io.FileIO):
    """A file whose read errors are PatchcacheErrors, whichever method reads it."""

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer, as `io.FileIO` does."""
        with self._converting_errors():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        """Read to the end, as `io.FileIO` does."""
        with self._converting_errors():
            return super().readall()

    @contextlib.contextmanager
    def _converting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PatchcacheError(
                f"{self.name!s}: {error.strerror}. Look after the disk."
            ) from None

    def _dealloc_warn(self, source: object) -> None:
        """Stay silent when the buffer around this file is collected first."""

    def __del__(self) -> None:
        """Close the file together with its last reader, as `zipfile` does with its own files."""
        self.close()


class RemoteFile:
    """A file behind an fsspec URL, read by range requests."""

    def __init__(self, url: str) -> None:
        """Name the file; nothing is requested yet."""
        self.address = url
        self._owner = 0
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """The last part of the URL."""
        path = urlsplit(self.address).path if self.address.startswith(WEB) else self.address
        return unquote(path.rstrip("/").rpartition("/")[2])

    @property
    def real_path(self) -> str:
        """The URL."""
        return self.address

    def size(self) -> int:
        """Return the number of bytes.

        Raises:
            FileNotFoundError: There is no such file.
            StageError: The server cannot be asked, or does not tell the size.
        """
        filesystem, path = filesystem_of(self.address)
        found = over_network(lambda: filesystem.info(path).get("size"), self.address)
        if found is None:
            raise StageError(
                f"{self.address}: the server does not tell the size of the file. Copy the file to "
                f"this machine and name the copy."
            )
        return int(found)

    def read_at(self, start: int, num_bytes: int) -> bytes:
        """Return bytes from an offset on; fewer where the file ends.

        Raises:
            FileNotFoundError: There is no such file.
            StageError: The server cannot be reached, or reads no part of a file.
        """
        with self._lock:
            return over_network(lambda: self._read_once(start, num_bytes), self.address)

    def _read_once(self, start: int, num_bytes: int) -> bytes:
        # Connections do not survive a fork. After an error the file is opened again.
        owner, self._owner = self._owner, 0
        if owner != os.getpid():
            filesystem, path = filesystem_of(self.address)
            self._file = filesystem.open(path, "rb", cache_type="none")
        try:
            self._file.seek(start)
            data = bytes(self._file.read(num_bytes))
        except ValueError as error:
            if self.address.startswith(WEB):
                raise StageError(
                    f"{self.address}: the server does not answer requests for a part of a file "
                    f"(HTTP range requests). Copy the file to this machine and name the copy."
                ) from error
            raise
        self._owner = os.getpid()
        return data

    def open(self, buffer_bytes: int = BUFFER_BYTES) -> BinaryIO:
        """Return a stream from the start of the file, which the caller closes.

        Raises:
            FileNotFoundError: There is no such file.
            StageError: Also from the stream's methods: the network failed.
        """
        return io.BufferedReader(OffsetReader(self, self.size()), buffer_bytes)

    def __getstate__(self) -> dict[str, object]:
        return {"address": self.address}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["address"])  # type: ignore[misc]


class OffsetReader(io.RawIOBase):
    """A stream over a file that is read by offset; one piece of it may be held in memory."""

    def __init__(self, file: ByteFile, num_bytes: int) -> None:
        """Start at the first byte of a file of this size."""
        self._file, self._num_bytes = file, num_bytes
        self._position = self._piece_start = 0
        self._piece = b""

    def hold(self, start: int, num_bytes: int) -> None:
        """Read a piece into memory, from which reads within the piece are answered."""
        self._piece = self._file.read_at(start, num_bytes)
        self._piece_start = start

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset, as files do."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._num_bytes}
        position = origin[whence] + offset
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; the errors are those of the file's `read_at`."""
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._num_bytes - self._position))
        start = self._position - self._piece_start
        if start >= 0 and start + wanted <= len(self._piece):
            data: bytes | memoryview = memoryview(self._piece)[start : start + wanted]
        else:
            data = self._file.read_at(self._position, wanted) if wanted else b""
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def over_network(action: Callable[[], Result], url: str) -> Result:
    """Run an action over a network, repeated where that can help.

    Raises:
        FileNotFoundError: The server answers that there is no such file.
        StageError: The server cannot be reached, refuses access, or does not deliver.
    """
    try:
        return attempt(action, url)
    except UnreachableStoreError as error:
        raise StageError(str(error)) from None
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
