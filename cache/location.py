"""Where a store's files are: a folder here, or an fsspec URL whose files are copied here."""

import os
import shutil
import tempfile
import threading
import weakref
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from cache.errors import CorruptShardError, IncompleteStoreError
from cache.table import ShardFile


class Location:
    """The files of one store; a URL's copies live as long as this does."""

    def __init__(self, root: str | Path) -> None:
        """Name the folder or URL; nothing is read yet."""
        self.root = str(root)
        self.is_remote = bool(urlsplit(self.root).scheme) and "://" in self.root
        if self.is_remote:
            self._copies = Path(tempfile.mkdtemp(prefix="patchcache-"))
            weakref.finalize(self, _remove, self._copies, os.getpid())
            self._filesystem, self._folder = fsspec.core.url_to_fs(self.root.rstrip("/"))

    @cached_property
    def _listed(self) -> dict[str, int | None]:
        """Sizes from one listing, where the file system lists folders."""
        try:
            found = self._filesystem.ls(self._folder, detail=True)
        except (OSError, ValueError, NotImplementedError):
            return {}
        return {str(file["name"]).rsplit("/", 1)[-1]: file.get("size") for file in found}

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None when there is no such file."""
        try:
            if not self.is_remote:
                # Not through pathlib: a store can have a thousand shards.
                return os.stat(f"{self.root}/{name}").st_size  # noqa: PTH116
            return int(self._listed.get(name) or self._filesystem.size(f"{self._folder}/{name}"))
        except FileNotFoundError:
            return None

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

    def path(self, name: str) -> Path:
        """Return where a file can be read; a remote one is copied on first use.

        Raises:
            IncompleteStoreError: There is no such file.
        """
        if self.size(name) is None:
            raise IncompleteStoreError(
                f"{self.root}/{name}: missing, so {self.root} is no whole store. "
                f"Run `dvc pull`, or the extract stage."
            )
        return self._copied(name) if self.is_remote else Path(self.root) / name

    def _copied(self, name: str) -> Path:
        copy = self._copies / name
        if not copy.exists():
            # Each process and thread under a name of its own: workers may fetch the same file.
            partial = copy.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")
            self._filesystem.get_file(f"{self._folder}/{name}", str(partial))
            os.replace(partial, copy)
        return copy


def _remove(folder: Path, owner: int) -> None:
    """Delete the copies, unless this is a forked child of the process that made them."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
