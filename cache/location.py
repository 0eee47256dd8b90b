"""Where a store's files are: a folder here, or an fsspec URL whose files are copied here.

A copied file is as large as was promised, or refused before it is copied.
"""

import os
import shutil
import tempfile
import threading
import weakref
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from cache.errors import CorruptShardError, IncompleteStoreError


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

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None when there is no such file."""
        try:
            if not self.is_remote:
                return (Path(self.root) / name).stat().st_size
            return int(self._filesystem.size(f"{self._folder}/{name}"))
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Return the names of all files and folders, sorted."""
        if not self.is_remote:
            return sorted(path.name for path in Path(self.root).iterdir())
        found = self._filesystem.ls(self._folder, detail=False)
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def path(self, name: str, num_bytes: int | None = None) -> Path:
        """Return where a file can be read; a remote one is copied on first use.

        Args:
            name: Of the file.
            num_bytes: How large it must be, where that is known.

        Raises:
            IncompleteStoreError: There is no such file.
            CorruptShardError: It is of another size.
        """
        found = self.size(name)
        if found is None:
            raise IncompleteStoreError(
                f"{self.root}/{name}: missing, so {self.root} is no whole store. "
                f"Run `dvc pull`, or the extract stage."
            )
        if num_bytes is not None and found != num_bytes:
            raise CorruptShardError(
                f"{self.root}/{name}: has {found} bytes, the index says {num_bytes}. "
                f"Fetch it again, or run the extract stage."
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
