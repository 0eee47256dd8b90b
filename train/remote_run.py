"""The copy of a run behind an fsspec URL: its checkpoints, and at the end its files.

A machine that vanishes loses the steps since the last checkpoint that was sent. The network decides
nothing else: a checkpoint that cannot be sent is reported, and training goes on.
"""

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cache.errors import PatchcacheError, UnreachableStoreError
from cache.files.atomic import canonical_json, link_or_copy, replacing, sha256_of, write_bytes
from cache.remote.network import attempt
from cache.remote.urls import filesystem_of
from workspace.errors import StageError

CHECKPOINT_NAME = re.compile(r"step-\d{8,}\.safetensors")
"""Names of checkpoints; they sort by step."""

MANIFEST = "manifest.json"
"""Sent after all files of a finished run: their sha256, by name."""

LAST_SECONDS = 60.0
"""Most seconds that the end of a command waits for a checkpoint on its way."""

Result = TypeVar("Result")


class RemoteRun:
    """The folder of one run behind a URL, for its main process."""

    def __init__(self, url: str, stage: str, keep: int, outgoing: Path) -> None:
        """Name the folder; nothing is requested yet.

        Args:
            url: Of the folder.
            stage: Name for the messages.
            keep: Number of recent checkpoints that are kept there.
            outgoing: Local folder for checkpoints on their way.
        """
        self.url = url
        self._stage, self._keep, self._outgoing = stage, keep, outgoing
        self._lock = threading.Lock()
        self._waiting: Path | None = None
        self._thread: threading.Thread | None = None
        self._reported: set[str] = set()

    def newer_checkpoints(self, name: str, folder: Path) -> Iterator[Path]:
        """Fetch the checkpoints with a later name than this one, newest first, as they are asked.

        A server that cannot be reached is reported, and ends the iteration.

        Args:
            name: Of a checkpoint, or "" for all.
            folder: Gets the files.
        """
        try:
            for newer in reversed([n for n in self._names() if n > name]):
                self._get(newer, folder / newer)
                print(f"{self._stage}: fetched {self.url}/{newer}", file=sys.stderr)
                yield folder / newer
        except PatchcacheError as error:
            self._report(error, "The run goes on with what is on this machine.")

    def send_checkpoint(self, path: Path) -> None:
        """Send a checkpoint from another thread.

        Training never waits for it: a newer checkpoint replaces one that waits for its turn.
        """
        # The file itself may be deleted before its turn.
        link_or_copy(path, self._outgoing / path.name)
        with self._lock:
            overtaken, self._waiting = self._waiting, self._outgoing / path.name
            if overtaken not in (None, self._waiting):
                overtaken.unlink()
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_waiting, daemon=True)
                self._thread.start()

    def _send_waiting(self) -> None:
        while True:
            with self._lock:
                path, self._waiting = self._waiting, None
                if path is None:
                    self._thread = None
                    return
            try:
                self._put(path, path.name)
                self._delete([n for n in self._names() if n <= path.name][: -self._keep])
            except (PatchcacheError, OSError) as error:
                self._report(error, "Training goes on; the next checkpoint is sent in its place.")
            with self._lock:
                # The state of a step can be saved twice.
                if path != self._waiting:
                    path.unlink(missing_ok=True)

    def wait(self) -> None:
        """Wait for a checkpoint on its way, for a limited time."""
        with self._lock:
            thread = self._thread
        if thread is None:
            return
        thread.join(LAST_SECONDS)
        if thread.is_alive():
            print(
                f"{self._stage}: {self.url}: the last checkpoint did not get there within "
                f"{LAST_SECONDS:.0f} s",
                file=sys.stderr,
            )

    def send_run(self, folder: Path) -> None:
        """Send the files of the finished run, then delete its checkpoints there.

        Raises:
            StageError: The server does not take them.
        """
        self.wait()
        hashes = {
            path.relative_to(folder).as_posix(): sha256_of(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = self._outgoing / MANIFEST
        try:
            for name in hashes:
                self._put(folder / name, f"run/{name}")
            write_bytes(manifest, canonical_json(hashes))
            self._put(manifest, f"run/{MANIFEST}")
            self._delete(self._names())
        except (PatchcacheError, OSError) as error:
            raise StageError(
                f"the run is finished and published in {folder}, but could not be sent: {error} "
                f"The same command sends it again, without training."
            ) from None

    def _names(self) -> list[str]:
        """Return the names of the checkpoints there, oldest first."""

        def find(files: Any, place: str) -> list[str]:
            # A listing of before must not be repeated.
            files.invalidate_cache()
            with contextlib.suppress(FileNotFoundError):
                return [str(path).rpartition("/")[2] for path in files.ls(place, detail=False)]
            return []

        return sorted(filter(CHECKPOINT_NAME.fullmatch, self._do("", find)))

    def _get(self, name: str, path: Path) -> None:
        with replacing(path) as temporary:
            self._do(name, lambda files, place: files.get_file(place, str(temporary)))

    def _put(self, path: Path, name: str) -> None:
        def put(files: Any, place: str) -> None:
            # File systems with real folders want the folder first.
            files.makedirs(place.rpartition("/")[0], exist_ok=True)
            files.put_file(str(path), place)

        self._do(name, put)

    def _delete(self, names: list[str]) -> None:
        for name in names:
            self._do(name, lambda files, place: files.rm_file(place))

    def _do(self, name: str, action: Callable[[Any, str], Result]) -> Result:
        """Do something with a file there, or with the folder, with retries.

        Raises:
            PatchcacheError: It cannot be done.
            OSError: This machine cannot read or store the file.
        """
        files, folder = filesystem_of(self.url)
        place, url = (f"{root}/{name}".rstrip("/") for root in (folder, self.url))
        try:
            return attempt(lambda: action(files, place), url)
        except FileNotFoundError:
            raise UnreachableStoreError(f"{url}: no such file, folder or bucket.") from None

    def _report(self, error: Exception, outcome: str) -> None:
        """Print a failure, once for each kind of it."""
        kind = re.sub(r"\d+", "", str(error))
        if kind not in self._reported:
            self._reported.add(kind)
            print(f"{self._stage}: {error} {outcome}", file=sys.stderr)
