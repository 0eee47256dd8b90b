"""The files of a store behind an fsspec URL, copied here and held against what is known of them."""

import contextlib
import os
import threading
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from ..errors import FormatVersionError, PatchcacheError, SettingsError, UnreachableStoreError
from ..files.hashed import HashedFile
from ..files.scratch import ScratchFolder
from . import network
from .network import attempt

MAX_COPIES = 3
"""How often a file is copied until its bytes are right: some are flipped on their way."""

WEB = ("http://", "https://")

Check = Callable[[Path, int, str], None]
"""Holds a copy against what is known of the file, by path, number of bytes, and sha256."""


class RemoteFolder:
    """A folder behind a URL; the copies live as long as this does."""

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
        # One a process: those with connections refuse to work in a forked child.
        process = os.getpid()
        if process not in self._opened:
            try:
                self._opened[process] = fsspec.core.url_to_fs(_decoded(self.url), **self._options())
            except (ValueError, ImportError) as error:
                raise SettingsError(f"{self.url}: cannot be read here: {error}") from None
        return self._opened[process]

    def _options(self) -> dict[str, Any]:
        if not self.url.startswith(WEB):
            return {}
        from aiohttp import ClientTimeout

        # Not the five minutes for a whole file that aiohttp gives.
        timeout = ClientTimeout(
            total=None, sock_connect=network.READ_TIMEOUT, sock_read=network.READ_TIMEOUT
        )
        return {"client_kwargs": {"timeout": timeout}}

    @cached_property
    def _listed(self) -> dict[str, int | None]:
        """Sizes from one listing, where the file system lists folders with sizes."""
        filesystem, folder = self._files()
        if self.url.startswith(WEB):
            # Its listing is a page of links.
            return {}
        try:
            found = filesystem.ls(folder, detail=True)
        except Exception:
            # Each file is asked for then, and says what is wrong.
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
        """Return a file's copy; it is made on first use, and only once it is right.

        Args:
            name: Of the file.
            most_bytes: It may have no more.
            check: Raises a `PatchcacheError` for a copy that is not right; another is made then.

        Raises:
            FileNotFoundError: There is no such file.
            UnreachableStoreError: The server does not deliver it.
            PatchcacheError: What `check` raised for the last copy.
        """
        copy = self.copies / name
        copies_left = 0 if copy.exists() else MAX_COPIES
        while copies_left:
            copies_left -= 1
            try:
                self._copy_once(name, copy, most_bytes, check)
                break
            except (UnreachableStoreError, FormatVersionError):
                raise
            except PatchcacheError:
                if not copies_left:
                    raise
        return copy

    def _copy_once(self, name: str, copy: Path, most_bytes: int, check: Check) -> None:
        # Each process and thread under a name of its own: workers may fetch the same file.
        partial = copy.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")

        def fetch(files: fsspec.AbstractFileSystem, path: str) -> tuple[int, str]:
            with contextlib.closing(HashedFile(partial, most_bytes)) as target:
                files.get_file(path, target)
                return target.finish()

        try:
            check(partial, *self._attempt(name, fetch))
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)

    def _attempt(self, name: str, action: Callable[[fsspec.AbstractFileSystem, str], Any]) -> Any:
        """Do something with a file; a server that was given up before gets a single attempt."""
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


def _decoded(url: str) -> str:
    """Return a URL as its file system takes it: that of `file` takes no `%20` for a space."""
    if not url.startswith("file://"):
        return url
    path = url.removeprefix("file://")
    # A folder whose name holds such signs was always found as it is spelled.
    return url if Path(path).exists() else f"file://{unquote(path)}"
