"""The folder of this machine that holds shards of remote stores, up to a number of bytes.

A shard is named by the sha256 of its bytes: stores and processes share what is equal. While it
arrives it is `<sha256>.h5.part`, a sparse file, with one byte a row in `<sha256>.rows`, 1 once the
row's bytes were written. The least recently used shards are deleted beyond the limit; a process
that has mapped a deleted file keeps reading it.
"""

import contextlib
import errno
import fcntl
import math
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ..errors import SettingsError
from ..files.atomic import path_in_errors
from ..files.foreign import describe
from ..files.locks import NO_LOCKS
from ..texts import printable

FOLDER_VARIABLE, GIGABYTES_VARIABLE = "PATCHCACHE_CACHE_DIR", "PATCHCACHE_CACHE_GB"

FREE_SHARE = 0.5
"""Default limit, as a share of the free disk and of what the folder holds already: as much stays
for checkpoints, and another start finds the same limit."""

KEPT_SHARE = 0.9
"""How full the folder is after shards were deleted, so that this is not done at every batch."""

CHECK_SHARE = 0.01
"""After this share of the limit was written, the folder is measured."""

FULL = (errno.ENOSPC, errno.EDQUOT)

NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)

MAX_MAKINGS = 10
"""Most attempts to make a folder that is deleted again and again."""

OLD_SECONDS = 3600.0
"""Age at which a file that is no shard was left by a killed process."""

FILE = re.compile(r"([0-9a-f]{64})\.(h5|h5\.part|rows)")


@dataclass
class CacheFolder:
    """The folder and its limit."""

    path: Path
    limit: int
    """In bytes."""
    _written: float = field(default=math.inf, init=False)
    """Bytes since the folder was last measured."""
    _turn_of: int = field(default=0, init=False)
    """Number of this process while no other deletes shards, else 0."""

    @classmethod
    def open(cls, path: str | Path | None, num_bytes: int | None) -> "CacheFolder":
        """Create the folder if needed.

        Args:
            path: Of the folder; that of the environment when not given.
            num_bytes: Limit; that of the environment, or half of the free disk, when not given.

        Raises:
            SettingsError: An impossible limit, or a path that is no folder.
        """
        folder = Path(path or os.environ.get(FOLDER_VARIABLE) or _default_folder()).absolute()
        limit = _limit_in_bytes(num_bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            is_file = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "is no folder" if is_file else f"cannot be made ({describe(error)})"
            raise SettingsError(
                f"{printable(str(folder))}: {reason}, wanted one for shards of remote stores. Set "
                f"{FOLDER_VARIABLE}, or cache_dir."
            ) from None
        if limit is None:
            held = sum(size for _, size, _ in _shards_in(folder).values())
            limit = int(FREE_SHARE * (shutil.disk_usage(folder).free + held))
        return cls(folder, limit)

    def file(self, sha256: str) -> Path:
        """Return the path of a whole shard."""
        return self.path / f"{sha256}.h5"

    def part(self, sha256: str) -> Path:
        """Return the path of a shard that lacks rows."""
        return self.path / f"{sha256}.h5.part"

    def rows(self, sha256: str) -> Path:
        """Return the path of the bytes that say which rows of a part have arrived."""
        return self.path / f"{sha256}.rows"

    @contextlib.contextmanager
    def errors_explained(self) -> Iterator[None]:
        """Say of a folder that takes no bytes what to do.

        Raises:
            SettingsError: Writing is refused.
            OSError: The disk is full, or another failure of the system.
        """
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise OSError(
                    error.errno,
                    f"{error.strerror}, though shards of remote stores may take {self.limit} bytes "
                    f"there. Free some, or set {GIGABYTES_VARIABLE} or {FOLDER_VARIABLE}",
                    str(self.path),
                ) from None
            if error.errno in NOT_WRITABLE:
                raise SettingsError(
                    f"{self.path}: cannot be written ({error.strerror}), and does not hold all "
                    f"that is read. Set {FOLDER_VARIABLE}, or cache_dir."
                ) from None
            raise

    def _create(self, path: Path, mode: str) -> IO[bytes]:
        """Open a file of the folder, which may be deleted at any time, to write it."""
        for _ in range(MAX_MAKINGS):
            with (
                self.errors_explained(),
                contextlib.suppress(FileNotFoundError, FileExistsError),
            ):
                self.path.mkdir(parents=True, exist_ok=True)
                return path.open(mode)
        raise FileNotFoundError(errno.ENOENT, "its folder is deleted again and again", str(path))

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other process has the turn; nobody else deletes shards in the block."""
        with self.locked(".turn"):
            self._turn_of = os.getpid()
            try:
                yield
            finally:
                self._turn_of = 0

    @contextlib.contextmanager
    def locked(self, name: str = ".lock", *, wait: bool = True) -> Iterator[None]:
        """Exclude other processes and threads, by default those that rename or delete shards.

        Raises:
            BlockingIOError: Another holds the lock, and `wait` is false.
        """
        # Flock, since it excludes threads too; unlocked, since a child may have inherited it.
        with self._create(self.path / name, "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    fcntl.flock(lock, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def new_part(self, sha256: str, num_bytes: int) -> Iterator[Path]:
        """Yield a sparse file, to be given its structure; it becomes the part at the end.

        Raises:
            SettingsError: The folder cannot be written.
            FileNotFoundError: The file was deleted meanwhile.
            OSError: The disk has no room for the shard; names the file.
        """
        temporary = self.path / f".{sha256}.{os.getpid()}.{time.monotonic_ns()}"
        try:
            with path_in_errors(temporary), self._create(temporary, "wb") as file:
                file.truncate(num_bytes)
            yield temporary
            with self.locked():
                # Another process may have been faster.
                if not (self.file(sha256).exists() or self.part(sha256).exists()):
                    os.replace(temporary, self.part(sha256))
        finally:
            temporary.unlink(missing_ok=True)

    def arrived(self, sha256: str, num_rows: int) -> NDArray[np.bool_]:
        """Return which rows of a part were written, here or by another process: bool [N]."""
        found = np.zeros(num_rows, bool)
        with contextlib.suppress(FileNotFoundError):
            data = np.fromfile(self.rows(sha256), np.uint8, num_rows)
            found[: len(data)] = data == 1
        return found

    def note_rows(self, sha256: str, first: int, values: bytes) -> None:
        """Write the bytes of some rows that follow each other."""
        path = self.rows(sha256)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            with path_in_errors(path):
                os.pwrite(descriptor, values, first)
        finally:
            os.close(descriptor)

    def complete(self, sha256: str) -> None:
        """Give a part, which has all rows and the right sha256, the name of a whole shard.

        Raises:
            FileNotFoundError: It was deleted meanwhile.
        """
        with self.locked():
            os.replace(self.part(sha256), self.file(sha256))
            self.rows(sha256).unlink(missing_ok=True)

    def delete(self, sha256: str) -> None:
        """Delete a shard."""
        with self.locked():
            self._unlink(sha256)

    def _unlink(self, sha256: str) -> None:
        for path in (self.file(sha256), self.part(sha256), self.rows(sha256)):
            path.unlink(missing_ok=True)

    def wrote(self, num_bytes: int) -> bool:
        """Count bytes; return whether it is time for `shrink`."""
        self._written += num_bytes
        return self._written > CHECK_SHARE * self.limit

    def shrink(self, in_use: Set[str], limit: int | None = None) -> Set[str]:
        """Delete the least recently used shards if there are more bytes than the limit.

        Nothing is deleted while another process has the `turn`.

        Args:
            in_use: The sha256 of shards to keep, even beyond the limit.
            limit: In place of that of the folder.

        Returns:
            The sha256 of the shards that are left.
        """
        if self._turn_of == os.getpid():
            return self._shrink(in_use, limit)
        try:
            with self.locked(".turn", wait=False):
                return self._shrink(in_use, limit)
        except BlockingIOError:
            self._written = 0
            return _shards_in(self.path).keys()

    def _shrink(self, in_use: Set[str], limit: int | None) -> Set[str]:
        with self.locked():
            self._written = 0
            limit = self.limit if limit is None else limit
            shards = _shards_in(self.path)
            total = sum(num_bytes for _, num_bytes, _ in shards.values())
            if total <= limit:
                return shards.keys()
            for sha256, (_, num_bytes, _) in sorted(shards.items(), key=lambda item: item[1]):
                if total > KEPT_SHARE * limit and sha256 not in in_use:
                    self._unlink(sha256)
                    del shards[sha256]
                    total -= num_bytes
            _delete_leftovers(self.path)
            return shards.keys()


def _shards_in(folder: Path) -> dict[str, tuple[float, int, str]]:
    """Return time of the last use, bytes on the disk, and sha256 of each shard, by sha256."""
    found: dict[str, tuple[float, int, str]] = defaultdict(lambda: (0.0, 0, ""))
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if match := FILE.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    used, num_bytes, _ = found[match[1]]
                    # A sparse file takes what was written, in blocks of 512 bytes.
                    num_bytes += status.st_blocks * 512
                    found[match[1]] = max(used, status.st_mtime), num_bytes, match[1]
    return dict(found)


def _delete_leftovers(folder: Path) -> None:
    for path in folder.glob(".*.*.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > OLD_SECONDS:
                path.unlink()


def _default_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "patchcache"


def _limit_in_bytes(num_bytes: int | None) -> int | None:
    text = os.environ.get(GIGABYTES_VARIABLE)
    if num_bytes is not None:
        if isinstance(num_bytes, bool) or not isinstance(num_bytes, int) or num_bytes <= 0:
            raise SettingsError(f"cache_bytes is {num_bytes!r}, wanted a whole number above 0.")
        return num_bytes
    if not text:
        return None
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = math.nan
    if not 1 <= limit < math.inf:
        raise SettingsError(f"{GIGABYTES_VARIABLE} is {text!r}, wanted a number above 0, of GB.")
    return int(limit)
