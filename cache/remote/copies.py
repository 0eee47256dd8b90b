"""Copies files of a store behind an fsspec URL to this machine, and checks the copies."""

import contextlib
import io
import os
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from ..errors import (
    CorruptShardError,
    FormatVersionError,
    PatchcacheError,
    UnreachableStoreError,
)
from ..files.atomic import path_in_errors, sha256_of
from ..files.scratch import ScratchFolder
from .direct import DirectRequests
from .network import attempt, longest
from .urls import WEB, filesystem_of

MAX_COPIES = 3
"""Most copies of a file until one is right: bits can flip on the way."""

Check = Callable[[Path, int, str], None]
"""Refuses a damaged copy; called with its path, number of bytes, and sha256."""


class RemoteFolder:
    """A folder behind a URL; the copies are deleted with this object."""

    def __init__(self, url: str) -> None:
        """Name the folder; nothing is read yet.

        Raises:
            SettingsError: A URL of a kind that cannot be read here.
        """
        self.url = url.rstrip("/")
        self._opened: dict[int, tuple[fsspec.AbstractFileSystem, str]] = {}
        self._sizes: dict[str, int] = {}
        self._is_reachable = True
        self._direct = DirectRequests(self.url)
        self.ignores_ranges = False
        """Whether the server answered a request for a part of a file with the whole file."""
        self._files()
        self._folder = ScratchFolder()
        self.copies = self._folder.path

    def _files(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the file system of the URL and the folder in it."""
        # One for each process: file systems with connections refuse to work in a forked child.
        process = os.getpid()
        if process not in self._opened:
            self._opened[process] = filesystem_of(self.url)
        return self._opened[process]

    @cached_property
    def _listed(self) -> dict[str, int | None]:
        """Sizes from one listing, where the file system lists folders with sizes."""
        filesystem, folder = self._files()
        if self.url.startswith(WEB):
            # The listing of a web server is a page of links.
            return {}
        try:
            found = filesystem.ls(folder, detail=True)
        except Exception:
            # The request for each file will say what is wrong.
            return {}
        return {str(file["name"]).rsplit("/", 1)[-1]: file.get("size") for file in found}

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None when the server does not tell.

        Raises:
            FileNotFoundError: There is no such file.
            UnreachableStoreError: The server cannot be asked.
        """
        if name not in self._sizes:
            found = self._listed.get(name) or self._attempt(
                name, lambda files, path: files.size(path)
            )
            if found is None:
                return None
            self._sizes[name] = int(found)
        return self._sizes[name]

    def read(self, name: str, start: int, stop: int, num_bytes: int) -> tuple[int, bytes]:
        """Request a part of a file.

        Args:
            name: Of the file.
            start: Its first byte.
            stop: The byte after its last.
            num_bytes: Size of the whole file.

        Returns:
            Where the bytes begin in the file, and the bytes: those asked for, or the whole file
            from a server that ignores ranges.

        Raises:
            FileNotFoundError: There is no such file.
            UnreachableStoreError: The server does not deliver it.
        """

        def request(files: fsspec.AbstractFileSystem, path: str) -> tuple[int, bytes]:
            data = self._direct.read(files, path, start, stop, num_bytes)
            if data is None:
                # A file system without ranges of its own would read ahead.
                slow = {"timeout": longest(num_bytes)}
                options = slow if files.async_impl else {"cache_type": "none"}
                data = files.cat_file(path, start=start, end=stop, **options)
            if len(data) == stop - start:
                return start, data
            if len(data) == num_bytes:
                self.ignores_ranges = True
                return 0, data
            raise ConnectionError(f"{len(data)} of {stop - start} bytes came")

        found: tuple[int, bytes] = self._attempt(name, request)
        return found

    def copy(self, name: str, most_bytes: int, check: Check) -> Path:
        """Return a checked copy of a file; it is made on first use.

        Args:
            name: Of the file.
            most_bytes: Largest allowed size.
            check: Raises a `PatchcacheError` for a damaged copy, which is then made again.

        Raises:
            FileNotFoundError: There is no such file.
            UnreachableStoreError: The server does not deliver it.
            PatchcacheError: From `check`, for the last copy.
        """
        copy = self.copies / name
        if copy.exists():
            return copy
        for number in range(1, MAX_COPIES + 1):
            try:
                self._copy_once(name, copy, most_bytes, check)
                break
            except (UnreachableStoreError, FormatVersionError):
                raise
            except PatchcacheError:
                if number == MAX_COPIES:
                    raise
        return copy

    def _copy_once(self, name: str, copy: Path, most_bytes: int, check: Check) -> None:
        # Each process and thread under a name of its own: workers may fetch the same file.
        partial = copy.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")

        def fetch(files: fsspec.AbstractFileSystem, path: str) -> None:
            with contextlib.closing(BoundedFile(partial, most_bytes)) as target:
                files.get_file(path, target)

        try:
            self._attempt(name, fetch)
            check(partial, partial.stat().st_size, sha256_of(partial))
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)

    def _attempt(self, name: str, action: Callable[[fsspec.AbstractFileSystem, str], Any]) -> Any:
        """Do something with a file; a server that failed before gets a single attempt."""
        filesystem, folder = self._files()
        try:
            result = attempt(
                lambda: action(filesystem, f"{folder}/{name}"),
                f"{self.url}/{name}",
                self.copies,
                retry=self._is_reachable,
            )
        except UnreachableStoreError:
            self._is_reachable = False
            raise
        self._is_reachable = True
        return result


class BoundedFile(io.BufferedWriter):
    """A new file that refuses more bytes than it may have.

    Some file systems of fsspec write into a file object, others open a path: it serves as both.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        """Create the file."""
        super().__init__(io.FileIO(path, "wb"))
        self._path = path
        self._most_bytes = most_bytes

    def __fspath__(self) -> str:
        return str(self._path)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write bytes.

        Raises:
            CorruptShardError: The file would have more bytes than it may have.
            OSError: They cannot be stored; names the file.
        """
        if self.tell() + len(data) > self._most_bytes:
            raise CorruptShardError(f"more than {self._most_bytes} bytes came")
        with path_in_errors(self._path):
            return super().write(data)
