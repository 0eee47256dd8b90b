"""Copies files of a store behind an fsspec URL to this machine, and checks the copies."""

import contextlib
import io
import os
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from ..errors import (
    CorruptShardError,
    FormatVersionError,
    PatchcacheError,
    SettingsError,
    UnreachableStoreError,
)
from ..files.atomic import path_in_errors, sha256_of
from ..files.scratch import ScratchFolder
from . import network
from .network import attempt

MAX_COPIES = 3
"""Most copies of a file until one is right: bits can flip on the way."""

WEB = ("http://", "https://")

HUB = "hf://"

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


def filesystem_of(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it; nothing is requested yet.

    Raises:
        SettingsError: A URL of a kind that cannot be read here.
    """
    try:
        found: tuple[fsspec.AbstractFileSystem, str] = fsspec.core.url_to_fs(
            _decoded(url), **_options(url)
        )
    except (ValueError, ImportError) as error:
        raise SettingsError(f"{url}: cannot be read here: {error}") from None
    return found


def _options(url: str) -> dict[str, Any]:
    if url.startswith(HUB):
        # A cached file system would repeat its old listing, and a refusal after the login.
        return {"skip_instance_cache": True}
    if not url.startswith(WEB):
        return {}
    from aiohttp import ClientTimeout

    # In place of aiohttp's five minutes for a whole file.
    timeout = ClientTimeout(
        total=None, sock_connect=network.READ_TIMEOUT, sock_read=network.READ_TIMEOUT
    )
    return {"client_kwargs": {"timeout": timeout}}


def _decoded(url: str) -> str:
    """Return a URL as its file system takes it: that of `file` takes no `%20` for a space."""
    if not url.startswith("file://"):
        return url
    path = url.removeprefix("file://")
    # An existing folder can have such signs in its name.
    return url if Path(path).exists() else f"file://{unquote(path)}"
