"""A claim on a destination (`writing.json`): one writer at a time, without locks of the server.

fsspec has no conditional write for every store. A writer therefore puts its claim, waits longer
than the interval in which other writers look, and continues only if the claim is unchanged. A claim
that is not renewed for 45 s has expired and is taken over. Clocks of machines are never compared.

The claim also says which files have been sent, with their sha256: the next writer does not send
them again.
"""

import contextlib
import os
import re
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

from ..errors import CacheError, PatchcacheError
from ..files.atomic import canonical_json
from ..files.foreign import parse_json
from ..texts import printable, without_passwords
from .destination import Destination

CLAIM_FILE = "writing.json"

POLL_SECONDS = 2.0
"""Time between two looks of a writer at its claim."""

SETTLE_SECONDS = 3.0
"""Time for which a new claim must stand: longer than `POLL_SECONDS`."""

RENEW_SECONDS = 10.0
"""Time between two changes of a claim."""

END_SECONDS = 10.0
"""How long the end of a writer waits for a renewal that is on its way."""

EXPIRY_SECONDS = 45.0
"""Time without a change after which a claim has expired."""

MAX_BYTES = 1 << 26
"""Most bytes of a claim that are read: the names and hashes of half a million shards."""

SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Note:
    """The content of a claim."""

    writer: str = ""
    """Empty once the writer has ended."""
    who: str = ""
    since: str = ""
    renewed: int = 0
    sent: dict[str, str] = field(default_factory=dict)
    """Name to sha256 of files that have been sent."""


class Claim:
    """Holds a destination within a `with` block."""

    def __init__(self, destination: Destination, wanted: dict[str, str] | None = None) -> None:
        """Name the destination.

        Args:
            destination: The folder.
            wanted: Name to sha256 of the files that will be there. Of the files that another writer
                has sent, those with other bytes are forgotten before they are replaced.
        """
        self.sent: dict[str, str] = {}
        """Name to sha256 of the files that are there for certain; the writer adds its own."""
        self.is_complete = False
        """Whether the store is in place, so that nobody has to continue."""
        self._destination = destination
        self._wanted = wanted
        self._note = Note(
            destination.writer,
            f"process {os.getpid()} on {socket.gethostname()}",
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._lost: Exception | None = None
        self._seen = 0.0
        self._end = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Claim":
        """Claim the destination.

        Raises:
            CacheError: Another writer holds it.
            UnreachableStoreError: The server cannot be reached, or refuses to write.
        """
        try:
            self._take()
        except BaseException:
            self._release()
            raise
        self._looking.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    def check(self) -> None:
        """Refuse to go on unless the claim stood a moment ago.

        Raises:
            CacheError: Another writer has taken the destination.
            UnreachableStoreError: The server does not tell.
        """
        if self._lost:
            raise self._lost
        if time.monotonic() - self._seen > EXPIRY_SECONDS / 2:
            self.confirm()

    def confirm(self) -> None:
        """Refuse to go on unless the claim stands now; the errors are those of `check`."""
        now = time.monotonic()
        found = self._read()
        if found is None or found.writer != self._note.writer:
            raise self._taken(found)
        self._seen = now

    def _take(self) -> None:
        found = self._read()
        if found and found.writer:
            found = self._watch(found)
        sent = found.sent if found else {}
        wanted = sent if self._wanted is None else self._wanted
        self.sent |= {name: digest for name, digest in sent.items() if wanted.get(name) == digest}
        self._write()
        time.sleep(SETTLE_SECONDS)
        self.confirm()

    def _release(self) -> None:
        self._end.set()
        if self._looking.is_alive():
            # A renewal that is on its way would come after the end.
            self._looking.join(END_SECONDS)
        # The claim of a writer that cannot give it back is taken over in time.
        with contextlib.suppress(PatchcacheError, OSError):
            self.confirm()
            if self.is_complete:
                self._destination.delete(CLAIM_FILE)
            else:
                self._put(Note(sent=dict(self.sent)))

    def _look(self) -> None:
        """Look at the claim again and again, and renew it."""
        renewed = time.monotonic()
        while not self._end.wait(POLL_SECONDS):
            try:
                self.confirm()
                if time.monotonic() - renewed > RENEW_SECONDS and not self._end.is_set():
                    self._write()
                    renewed = time.monotonic()
            except OSError:
                # UnreachableStoreError, too: `check` decides when this has lasted too long.
                continue
            except CacheError as error:
                self._lost = error
                return

    def _watch(self, found: Note) -> Note | None:
        """Wait until a claim ends, or has not changed for a while; return its last content.

        Raises:
            CacheError: It changed: its writer lives.
        """
        print(
            f"{without_passwords(self._destination.url)}: {found.who} began to write there at "
            f"{found.since}; waiting "
            f"up to {EXPIRY_SECONDS:.0f} s for a sign of it",
            flush=True,
        )
        last = time.monotonic() + EXPIRY_SECONDS
        while time.monotonic() < last:
            time.sleep(POLL_SECONDS)
            again = self._read()
            if again is None or not again.writer:
                return again
            if again != found:
                raise self._taken(again)
        return found

    def _taken(self, found: Note | None) -> CacheError:
        url = self._destination.url
        if found is None or not found.writer:
            return CacheError(
                f"{url}: {CLAIM_FILE}, the claim of this writer, has been taken away by another "
                f"one. Run the same command again; what has been sent is kept."
            )
        return CacheError(
            f"{url}: {found.who} has been writing a store there since {found.since}. Wait until "
            f"it has ended, or stop it; then run the same command again."
        )

    def _write(self) -> None:
        self._note = replace(self._note, renewed=self._note.renewed + 1, sent=dict(self.sent))
        self._put(self._note)

    def _put(self, note: Note) -> None:
        self._destination.put(CLAIM_FILE, canonical_json(asdict(note)))

    def _read(self) -> Note | None:
        data = self._destination.read(CLAIM_FILE, MAX_BYTES)
        return None if data is None else _note_of(data, f"{self._destination.url}/{CLAIM_FILE}")


def _note_of(data: bytes, where: str) -> Note:
    """Read a claim, which is data from outside.

    Raises:
        CacheError: The file is no claim.
    """
    try:
        values = parse_json(data.decode())
        texts = [values[name] for name in ("writer", "who", "since")]
        renewed, sent = int(values["renewed"]), values["sent"].items()
        if not all(isinstance(text, str) for text in texts):
            raise ValueError
        writer, who, since = (printable(text)[:100] for text in texts)
        known = {name: digest for name, digest in sent if SHA256.fullmatch(digest)}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise CacheError(
            f"{where}: is not the claim of a writer of stores. Delete it, or publish elsewhere."
        ) from None
    return Note(writer, who, since, renewed, known)
