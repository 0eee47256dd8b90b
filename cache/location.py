"""Where a store's files are: a folder here, or an fsspec URL whose files are copied here."""

import os
import re
import shutil
import stat
import tempfile
import threading
import weakref
from functools import cached_property
from pathlib import Path

import fsspec

from cache.errors import CorruptShardError, IncompleteStoreError, SettingsError
from cache.table import ShardFile

URL = re.compile(r"[A-Za-z][\w+.-]*:")


class Location:
    """The files of one store; a URL's copies live as long as this does."""

    def __init__(self, root: str | Path) -> None:
        """Name the folder or URL; nothing is read yet.

        Raises:
            SettingsError: A URL of a kind that cannot be read here.
        """
        self.root = str(root)
        self.is_remote = "://" in self.root and bool(URL.match(self.root))
        self.address = self.root if self.is_remote else str(Path(root).absolute())
        """The URL, or the whole path, which holds when the working directory changes."""
        if self.is_remote:
            self._opened: dict[int, tuple[fsspec.AbstractFileSystem, str]] = {}
            self._files()
            self._copies = Path(tempfile.mkdtemp(prefix="patchcache-"))
            weakref.finalize(self, _remove, self._copies, os.getpid())

    def _files(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the file system of the URL and the folder in it."""
        # One a process: those with connections refuse to work in a forked child.
        process = os.getpid()
        if process not in self._opened:
            try:
                self._opened[process] = fsspec.core.url_to_fs(self.root.rstrip("/"))
            except (ValueError, ImportError) as error:
                raise SettingsError(f"{self.root}: cannot be read here: {error}") from None
        return self._opened[process]

    @cached_property
    def _listed(self) -> dict[str, int | None]:
        """Sizes from one listing, where the file system lists folders."""
        filesystem, folder = self._files()
        try:
            found = filesystem.ls(folder, detail=True)
        except (OSError, ValueError, NotImplementedError):
            return {}
        return {str(file["name"]).rsplit("/", 1)[-1]: file.get("size") for file in found}

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None when there is no such file.

        Raises:
            IncompleteStoreError: It is no file, or its server does not say how large it is.
        """
        try:
            found = self._remote_size(name) if self.is_remote else self._local_size(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if found is None:
            raise IncompleteStoreError(
                f"{self.root}/{name}: is no file, or of unknown size. Fetch the store again, or "
                f"copy it here."
            )
        return found

    def _local_size(self, name: str) -> int | None:
        # Not through pathlib: a store can have a thousand shards.
        found = os.stat(f"{self.address}/{name}")  # noqa: PTH116
        # A pipe would be waited for, and a device has no end.
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def _remote_size(self, name: str) -> int | None:
        filesystem, folder = self._files()
        found = self._listed.get(name) or filesystem.size(f"{folder}/{name}")
        return None if found is None else int(found)

    def check_size(self, shard: ShardFile) -> None:
        """Hold the size of a shard's file, if there is one, against the index.

        Raises:
            CorruptShardError: It is another one.
        """
        found = self.size(shard.name)
        if found is not None and found != shard.num_bytes:
            raise CorruptShardError(
                f"{self.root}/{shard.name}: has {found} bytes, the index says {shard.num_bytes}. "
                f"Fetch it again, or run the extract stage."
            )

    def path(self, name: str, most_bytes: int | None = None) -> Path:
        """Return where a file can be read; a remote one is copied on first use.

        Args:
            name: Of the file.
            most_bytes: A larger one is refused, and not copied.

        Raises:
            IncompleteStoreError: There is no such file, none of a known size, or a larger one.
        """
        found = self.size(name)
        if found is not None and most_bytes is not None and found > most_bytes:
            raise IncompleteStoreError(
                f"{self.root}/{name}: has {found} bytes, wanted at most {most_bytes}. "
                f"Fetch it again."
            )
        if found is None:
            raise IncompleteStoreError(
                f"{self.root}/{name}: missing, so {self.root} is no whole store. "
                f"Run `dvc pull`, or the extract stage."
            )
        return self._copied(name) if self.is_remote else Path(self.address) / name

    def _copied(self, name: str) -> Path:
        copy = self._copies / name
        if not copy.exists():
            # Each process and thread under a name of its own: workers may fetch the same file.
            partial = copy.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")
            filesystem, folder = self._files()
            filesystem.get_file(f"{folder}/{name}", str(partial))
            os.replace(partial, copy)
        return copy


def _remove(folder: Path, owner: int) -> None:
    """Delete the copies, unless this is a forked child of the process that made them."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
