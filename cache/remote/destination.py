"""The folder behind an fsspec URL that a store or a run is published to: its files are listed, put,
read back and deleted.

A file appears whole under its name. An object store replaces an object in one step; elsewhere a
file is put under another name and renamed.
"""

import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from ..errors import UnreachableStoreError
from ..files.atomic import replacing
from .network import attempt
from .urls import LOCAL, OBJECT_STORES, check_writable, filesystem_of

PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial")
"""Name of a file that is being put, where it is renamed afterwards."""

Result = TypeVar("Result")


class Destination:
    """A folder behind a URL, seen without any cache."""

    def __init__(self, url: str) -> None:
        """Name the folder; nothing is requested yet.

        Raises:
            SettingsError: A URL of a kind that cannot be written.
        """
        self.url = url.rstrip("/")
        self.writer = uuid.uuid4().hex
        """Distinguishes this writer from any other."""
        check_writable(url)
        self._files, self._folder = filesystem_of(self.url)
        kind = url.partition("://")[0].lower()
        self._is_object_store = kind in OBJECT_STORES
        self.is_local = kind in LOCAL
        """Whether the folder is one of this machine."""

    def list(self) -> dict[str, int]:
        """Return the size of every file of the folder by its name; empty if there is no folder.

        Raises:
            UnreachableStoreError: The server does not tell.
        """

        def listed(files: fsspec.AbstractFileSystem, path: str) -> list[dict[str, Any]]:
            try:
                return list(files.ls(path.rstrip("/"), detail=True))
            except FileNotFoundError:
                return []

        found = self._attempt("", listed)
        return {
            str(file["name"]).rsplit("/", 1)[-1]: int(file["size"] or 0)
            for file in found
            if file.get("type") != "directory"
        }

    def read(self, name: str, most_bytes: int | None = None) -> bytes | None:
        """Return the first bytes of a file; None when there is no such file.

        Raises:
            UnreachableStoreError: The server does not deliver it.
        """

        def content(files: fsspec.AbstractFileSystem, path: str) -> bytes | None:
            try:
                limits = {} if most_bytes is None else {"start": 0, "end": most_bytes}
                return bytes(files.cat_file(path, **limits))
            except FileNotFoundError:
                return None

        return self._attempt(name, content)

    def get(self, name: str, path: Path) -> None:
        """Fetch a file.

        Args:
            name: Of the file.
            path: Where it appears whole.

        Raises:
            UnreachableStoreError: The server does not deliver it.
            OSError: This machine cannot store it.
        """
        with replacing(path) as local:
            self._attempt(name, lambda files, there: files.get_file(there, str(local)), path.parent)

    def put(self, name: str, content: Path | bytes) -> None:
        """Put a file, which replaces one of its name in one step; a bucket is never made.

        Args:
            name: Of the file; the folders of `a/b` are made where there are folders.
            content: A local file, or the bytes.

        Raises:
            UnreachableStoreError: The server does not take it.
            OSError: The local file cannot be read, or the disk behind a `file://` URL is full.
        """

        def sent(files: fsspec.AbstractFileSystem, path: str) -> None:
            target = path
            if not self._is_object_store:
                folder, _, last = path.rpartition("/")
                files.makedirs(folder, exist_ok=True)
                target = f"{folder}/.{last}.{self.writer}.partial"
            if isinstance(content, Path):
                files.put_file(str(content), target)
            else:
                files.pipe_file(target, content)
            if target != path:
                files.mv(target, path)

        self._attempt(name, sent, content.parent if isinstance(content, Path) else None)

    def delete(self, name: str) -> None:
        """Delete a file, if it is there.

        Raises:
            UnreachableStoreError: The server refuses.
        """

        def deleted(files: fsspec.AbstractFileSystem, path: str) -> None:
            try:
                files.rm_file(path)
            except FileNotFoundError:
                return

        self._attempt(name, deleted)

    def _attempt(
        self,
        name: str,
        action: Callable[[fsspec.AbstractFileSystem, str], Result],
        source: Path | None = None,
    ) -> Result:
        where = f"{self.url}/{name}".rstrip("/")

        def request() -> Result:
            # Sizes and names of a moment ago do not count.
            self._files.invalidate_cache()
            return action(self._files, f"{self._folder}/{name}")

        try:
            return attempt(request, where, source)
        except UnreachableStoreError as error:
            text = str(error).replace("cannot be read", "cannot be written")
            raise UnreachableStoreError(text) from None
        except FileNotFoundError:
            raise UnreachableStoreError(
                f"{where}: there is no such bucket or folder to write to. Create it, or correct "
                f"the URL."
            ) from None
        except OSError as error:
            if error.filename is None:
                error.filename = where
            raise
