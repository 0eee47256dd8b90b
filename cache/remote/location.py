"""The place of a store: a folder, an fsspec URL whose files are copied to this machine, or a folder
whose shards are at a URL.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import REMEDY, CorruptShardError, IncompleteStoreError, PatchcacheError
from ..spec import MAX_JSON_BYTES, SPEC_FILE, Spec
from ..store_index import INDEX_FILE, SHARD_NAME, ShardFile, check_own_hash
from .copies import RemoteFolder
from .origin import read_origin
from .urls import is_url


class Location:
    """The files of one store. Copies of a URL's files are deleted with this object."""

    def __init__(self, root: str | Path) -> None:
        """Name the folder or URL; nothing is read yet.

        Raises:
            SettingsError: A URL of a kind that cannot be read here.
            IncompleteStoreError: The folder's `origin.json` is damaged.
        """
        self.root = str(root)
        self.address = self.root if is_url(self.root) else str(Path(root).absolute())
        """The URL, or the absolute path, which holds when the working directory changes."""
        self.origin = None if is_url(self.root) else read_origin(Path(root))
        """URL of the shards, if those of a folder are elsewhere."""
        url = self.root if is_url(self.root) else self.origin
        self.is_remote = url is not None
        """Whether the shards are at a URL."""
        self.remote = RemoteFolder(url) if url is not None else None
        """The folder of that URL."""

    def _remote_of(self, name: str) -> RemoteFolder | None:
        """Return the remote folder that a file is in; None for a file on this machine."""
        return None if self.origin and not SHARD_NAME.fullmatch(name) else self.remote

    def where(self, name: str) -> str:
        """Return a file's path or URL, for error texts."""
        root = self.origin if self.origin and self._remote_of(name) else self.root
        return f"{root.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None when there is no such file.

        Raises:
            IncompleteStoreError: Not an ordinary file, or the server does not tell its size.
            UnreachableStoreError: The server cannot be asked.
        """
        try:
            remote = self._remote_of(name)
            found = remote.size(name) if remote else self._local_size(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if found is None:
            raise IncompleteStoreError(
                f"{self.where(name)}: not an ordinary file, or of unknown size. Put the file "
                f"of the store in its place, or use a copy of the store on this machine."
            )
        return found

    def _local_size(self, name: str) -> int | None:
        # Faster than pathlib: a store can have a thousand shards.
        found = os.stat(f"{self.address}/{name}")  # noqa: PTH116
        # Opening a pipe would block, and a device has no end.
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def check_size(self, shard: ShardFile) -> None:
        """Hold the size of a shard's file, if it exists, against the index.

        Raises:
            CorruptShardError: The size differs.
        """
        found = self.size(shard.name)
        if found is not None and found != shard.num_bytes:
            raise CorruptShardError(
                f"{self.where(shard.name)}: has {found} bytes, the index says {shard.num_bytes}. "
                f"{self.remedy}"
            )

    @property
    def remedy(self) -> str:
        """What to do about a damaged file."""
        if self.origin:
            return f"Push the store to {self.origin} again, then run the extract stage."
        return "Push the store there again." if self.is_remote else REMEDY

    def path(self, name: str, most_bytes: int | None = None, sha256: str | None = None) -> Path:
        """Return the path of a readable file; a remote file is copied, and checked, on first use.

        Args:
            name: Of the file.
            most_bytes: A larger file is refused, and not copied.
            sha256: Of a remote file; spec.json and index.parquet carry their own.

        Raises:
            IncompleteStoreError: No such file, of unknown size, or larger than `most_bytes`.
            UnreachableStoreError: The server does not deliver it.
            CorruptShardError: Each copy has other bytes than were written.
        """
        found = self.size(name)
        if found is None:
            raise self._missing(name)
        if most_bytes is not None and found > most_bytes:
            raise IncompleteStoreError(
                f"{self.where(name)}: has {found} bytes, wanted at most {most_bytes}. {self.remedy}"
            )
        remote = self._remote_of(name)
        if not remote:
            return Path(self.address) / name
        try:
            return self._copy(remote, name, found, sha256)
        except PatchcacheError:
            raise
        except FileNotFoundError:
            raise self._missing(name) from None

    def read_spec(self) -> Spec:
        """Read the spec; the errors are those of `path` and of `Spec.from_json`."""
        return Spec.read(self.path(SPEC_FILE, MAX_JSON_BYTES))

    def shard_path(self, shard: ShardFile) -> Path:
        """Return the path of a shard's readable file; the errors are those of `path`."""
        return self.path(shard.name, shard.num_bytes, shard.sha256)

    def read(self, shard: ShardFile, start: int, stop: int) -> tuple[int, bytes]:
        """Request bytes of a shard behind a URL; arguments and result of `RemoteFolder.read`.

        Raises:
            IncompleteStoreError: No such file.
            UnreachableStoreError: The server does not deliver it.
        """
        assert self.remote is not None
        try:
            return self.remote.read(shard.name, start, stop, shard.num_bytes)
        except FileNotFoundError:
            raise self._missing(shard.name) from None

    def _copy(self, remote: RemoteFolder, name: str, num_bytes: int, sha256: str | None) -> Path:
        where = self.where(name)

        def check(copy: Path, found_bytes: int, found_sha256: str) -> None:
            if found_bytes != num_bytes:
                raise CorruptShardError(
                    f"{where}: {found_bytes} bytes came, the server says {num_bytes}. {self.remedy}"
                )
            if sha256 is not None and found_sha256 != sha256:
                raise CorruptShardError(
                    f"{where}: its sha256 is {found_sha256}, {INDEX_FILE} has {sha256}. It was "
                    f"damaged or changed. {self.remedy}"
                )
            if name == SPEC_FILE:
                Spec.from_json(copy.read_bytes(), where)
            if name == INDEX_FILE:
                check_own_hash(copy, where)

        return remote.copy(name, num_bytes, check)

    def _missing(self, name: str) -> IncompleteStoreError:
        remedy = (
            "Check the address, or push the store there again."
            if self._remote_of(name)
            else "Run `dvc pull`, or the extract stage."
        )
        if not (self._remote_of(name) or Path(self.address).is_dir()):
            return IncompleteStoreError(
                f"{self.root}: no such folder, so this is no whole store. Check its name; `dvc "
                f"pull` or the extract stage makes data/features."
            )
        return IncompleteStoreError(
            f"{self.where(name)}: missing, so this is no whole store. {remedy}"
        )

    @contextlib.contextmanager
    def url_in_errors(self) -> Iterator[None]:
        """Let errors about the copy of a file name the server's file and its remedy instead."""
        try:
            yield
        except PatchcacheError as error:
            if self.remote:
                copies, url = str(self.remote.copies), self.remote.url
                error.args = tuple(
                    str(text).replace(copies, url).replace(REMEDY, self.remedy)
                    for text in error.args
                )
            raise
