"""The copy of a run behind an fsspec URL: its checkpoints, and at the end its files.

A machine that vanishes loses the steps since the last checkpoint that was sent. A failed upload of
a checkpoint is reported and training continues; a failed upload of the finished run is an error.
"""

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from cache.errors import PatchcacheError
from cache.files.atomic import canonical_json, link_or_copy, sha256_of
from cache.remote.destination import Destination
from cache.texts import without_passwords
from workspace.errors import StageError

CHECKPOINT_NAME = re.compile(r"step-\d{8,}\.safetensors")
"""Names of checkpoints; they sort by step."""

MANIFEST = "manifest.json"
"""Sent after all files of a finished run: their sha256, by name."""

LAST_SECONDS = 60.0
"""Most seconds that the end of a command waits for a checkpoint on its way."""


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
        self._there = Destination(url)
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
                self._there.get(newer, folder / newer)
                print(
                    f"{self._stage}: fetched {without_passwords(self.url)}/{newer}", file=sys.stderr
                )
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
                self._there.put(path.name, path)
                for old in [n for n in self._names() if n <= path.name][: -self._keep]:
                    self._there.delete(old)
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
                f"{self._stage}: {without_passwords(self.url)}: the last checkpoint did not get "
                f"there within {LAST_SECONDS:.0f} s",
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
        try:
            # That of a former run describes other files.
            if self._there.read(f"run/{MANIFEST}", 1) is not None:
                self._there.delete(f"run/{MANIFEST}")
            for name in hashes:
                self._there.put(f"run/{name}", folder / name)
            self._there.put(f"run/{MANIFEST}", canonical_json(hashes))
            # Also parts of those that a machine was sending when it vanished.
            for name in filter(CHECKPOINT_NAME.search, self._there.list()):
                self._there.delete(name)
        except (PatchcacheError, OSError) as error:
            raise StageError(
                f"the run is finished and published in {folder}, but could not be sent: {error} "
                f"The same command sends it again, without training."
            ) from None

    def _names(self) -> list[str]:
        """Return the names of the checkpoints there, oldest first."""
        return sorted(filter(CHECKPOINT_NAME.fullmatch, self._there.list()))

    def _report(self, error: Exception, outcome: str) -> None:
        """Print a failure, once for each kind of it."""
        kind = re.sub(r"\d+", "", str(error))
        if kind not in self._reported:
            self._reported.add(kind)
            print(f"{self._stage}: {error} {outcome}", file=sys.stderr)
