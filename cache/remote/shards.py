"""Shards of a store behind a URL: fetched row by row or whole, checked, kept on this machine.

The metadata at both ends of a shard is fetched first and validated like a local shard's; then
ranges of rows, each checked against its hash in the index before it is written. A shard whose rows
are all there is checked against its sha256. A row that was here before this process is checked
against its hash on its first use, since a crash may have left anything.

Letters: N rows of a shard.
"""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import REMEDY, CacheError, CorruptShardError, IncompleteStoreError, PatchcacheError
from ..files.atomic import path_in_errors, sha256_of
from ..mapping import FeatureMapping
from ..shard import Shard, hash_rows, open_shard
from ..spec import Spec
from ..store_index import INDEX_FILE, ShardFile
from . import network
from .cache_folder import FULL, CacheFolder
from .copies import MAX_COPIES
from .location import Location
from .row_ranges import RowRanges
from .row_states import READY, UNKNOWN, Evicted, RowStates
from .threads import (
    CHECK,
    GATHER,
    GATHER_SHARD,
    PREFETCH,
    WHOLE_SHARD,
    ExitError,
    submit,
    uninterrupted,
)

WHOLE_SHARE = 0.5
"""A shard is fetched whole if this share of its rows is wanted."""

MAX_OPENINGS = 10
"""Most attempts to use a shard whose file is deleted again and again."""

TOUCH_SECONDS = 10.0
"""How often the use of a shard is noted for `CacheFolder.shrink`."""


@dataclass(frozen=True)
class OpenedShard:
    """A file that is mapped."""

    path: Path
    is_part: bool
    """Whether rows are missing."""
    identity: tuple[int, int] | None
    """Device and number of the file."""
    offset: int
    """Bytes before its features."""


class RemoteShards:
    """The shards of one store behind a URL; their rows are read through a `FeatureMapping`."""

    def __init__(
        self,
        location: Location,
        spec: Spec,
        files: Sequence[ShardFile],
        num_rows: Sequence[int],
        mapping: FeatureMapping,
        row_xxh3: NDArray[np.uint64],
        cache: CacheFolder,
    ) -> None:
        """Fetch nothing yet.

        Args:
            location: Of the store.
            spec: Of the store.
            files: What the index says of each shard.
            num_rows: Of each shard.
            mapping: Of the rows.
            row_xxh3: The index's hash of each row of `mapping.rows`.
            cache: Holds the shards' files.
        """
        self._location, self._spec, self._files = location, spec, files
        self._num_rows, self._mapping, self._hashes = num_rows, mapping, row_xxh3
        self._cache = cache
        self._row_bytes = spec.patches * spec.width * np.dtype("<f2").itemsize
        self._opened: dict[int, OpenedShard] = {}
        self._locks: dict[tuple[int, int], threading.Lock] = {}
        self._refused: dict[int, CorruptShardError] = {}
        self._num_refusals: dict[int, int] = {}
        self._fits = sum(file.num_bytes for file in files) <= cache.limit
        self._touched = np.zeros(len(files))
        self._incomplete = {number for number, rows in enumerate(num_rows) if rows}
        self._is_closed = False
        self.all_here = False
        """Whether every row was checked and stays mapped: nothing is left to do before a read."""
        this = weakref.ref(self)

        def unmap(number: int) -> None:
            if shards := this():
                shards._opened.pop(number, None)
                shards._incomplete.add(number)
                mapping.detach(number, num_rows[number])

        self._states = RowStates(len(row_xxh3), mapping.starts, num_rows, unmap)
        self._ranges = RowRanges(self._states, self._row_bytes)

    @contextlib.contextmanager
    def readable(self, rows: NDArray[np.integer[Any]]) -> Iterator[None]:
        """Fetch and check rows of `mapping.rows`, and keep them mapped inside the `with` block.

        Raises:
            IncompleteStoreError: A shard is missing.
            CorruptShardError: The server's bytes are not those of the index.
            UnreachableStoreError: The server fails or refuses access.
            SettingsError: The folder of the cache cannot be written.
            OSError: This machine cannot store them.
        """
        numbers = np.unique(self._states.numbers_of(rows))
        for attempt in range(MAX_OPENINGS):
            with contextlib.ExitStack() as turn:
                if attempt:
                    # Processes that use more than the limit at once go one after the other.
                    turn.enter_context(self._cache.turn())
                with self._states.using(numbers, wait=True):
                    try:
                        self._make_ready(rows)
                    except Evicted:
                        continue
                    turn.close()
                    self._touch(numbers)
                    yield
                    return
        raise IncompleteStoreError(
            f"{self._cache.path}: shards of {self._location.root} were deleted, or damaged, "
            f"{MAX_OPENINGS} times while they were used. Check the disk, or allow more bytes."
        )

    def prefetch(self, rows: NDArray[np.integer[Any]]) -> None:
        """Begin to fetch some rows of `mapping.rows`; do not wait.

        A shard of which most rows are wanted is fetched whole, if the store fits the cache. If it
        does not, rows that would exceed the cache by themselves are not fetched before a gather.
        """
        unknown = np.unique(rows[self._states.of_row[rows] == UNKNOWN]).astype(np.int64)
        if not self._fits and len(unknown) * self._row_bytes > self._cache.limit:
            return
        unknown = unknown[~self._states.is_ahead[self._states.numbers_of(unknown)]]
        if self._fits:
            numbers, counts = np.unique(self._states.numbers_of(unknown), return_counts=True)
            most = numbers[counts >= WHOLE_SHARE * np.array(self._num_rows)[numbers]]
            self.read_ahead(most.tolist())
            unknown = unknown[~np.isin(self._states.numbers_of(unknown), most)]
        for run in self._ranges.joined(unknown):
            self._submit_later(PREFETCH, RemoteShards._fetch, run)

    def read_ahead(self, numbers: Sequence[int]) -> None:
        """Begin to fetch whole shards, in this order; do not wait."""
        for number in numbers:
            self._states.is_ahead[number] = True
            rows = np.flatnonzero(self._states.rows_of(number) == UNKNOWN)
            if len(rows) and number not in self._opened:
                # Otherwise all requests for its rows would wait for this one.
                self._submit_later(PREFETCH, RemoteShards._prepare, number)
            for run in self._ranges.joined(rows + self._mapping.starts[number]):
                self._submit_later(WHOLE_SHARD, RemoteShards._fetch_ahead, run)
            if number in self._opened:
                self._mapping.read_ahead(number, self._num_rows[number])
        self._touch(np.asarray(numbers, np.int64))

    def close(self) -> None:
        """Drop what is queued; nobody reads any more."""
        self._is_closed = True

    def _submit_later(
        self, urgency: int, action: Callable[["RemoteShards", Any], None], argument: Any
    ) -> None:
        def act() -> None:
            # The `gather` that needs these rows raises the error.
            with contextlib.suppress(PatchcacheError, OSError, Evicted, ExitError):
                if not self._is_closed:
                    action(self, argument)

        submit(urgency, act)

    def _make_ready(self, rows: NDArray[np.integer[Any]]) -> None:
        while True:
            missing = np.unique(rows[self._states.of_row[rows] != READY]).astype(np.int64)
            if not len(missing):
                return
            self._check_local(missing)
            unknown = missing[self._states.of_row[missing] == UNKNOWN]
            wanted = self._ranges.with_whole_requests(unknown)
            fetched: list[tuple[slice, Future[None]]] = []
            for run in self._ranges.joined(wanted):
                is_ahead = self._states.is_ahead[self._states.number_of(run.start)]
                urgency = GATHER_SHARD if is_ahead else GATHER
                fetched.append((run, submit(urgency, self._fetch, run)))
            for run, future in fetched:
                # A request can hold rows that nobody has asked for.
                mine = missing[(missing >= run.start) & (missing < run.stop)]
                error = future.exception()
                if error and (self._states.of_row[mine] == UNKNOWN).any():
                    raise error
            self._states.wait_for(missing)

    def _check_local(self, rows: NDArray[np.int64]) -> None:
        """Check those of some rows that are on this machine."""
        numbers = self._states.numbers_of(rows)
        for number in np.unique(numbers).tolist():
            if number in self._refused:
                raise self._refused[number]
            if self._open(number, may_request=False):
                with self._states.claimed(rows[numbers == number]) as mine:
                    self._check_arrived(number, mine)

    def _fetch(self, run: slice) -> None:
        """Fetch the rows of a range that nobody else fetches."""
        number = self._states.number_of(run.start)
        with self._states.using(np.array([number]), wait=False):
            self._open(number)
            with self._states.claimed(np.arange(run.start, run.stop)) as rows:
                self._check_arrived(number, rows)
                rows = rows[self._states.of_row[rows] != READY]
                for part in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
                    if len(part):
                        self._request_rows(number, part)
            self._finish(number)

    def _fetch_ahead(self, run: slice) -> None:
        """Fetch a range of a shard that is fetched whole; after an error, it is not any more."""
        try:
            self._fetch(run)
        except BaseException:
            self._states.is_ahead[self._states.number_of(run.start)] = False
            raise

    def _prepare(self, number: int) -> None:
        """Open a shard whose rows will be fetched."""
        with self._states.using(np.array([number]), wait=False):
            self._open(number)

    def _open(self, number: int, *, may_request: bool = True) -> OpenedShard | None:
        """Map a shard that is in use, if it is not mapped; request its structure if needed."""
        if found := self._opened.get(number):
            return found
        lock = self._lock(number)
        if not lock.acquire(blocking=may_request):
            # Another thread is opening this shard.
            return None
        try:
            found = self._opened.get(number) or self._open_local(number)
            if found or not may_request:
                return found
            pieces = self._request_structure(number)
            found = self._open_local(number)
            if not found:
                raise Evicted
            for at, data in pieces:
                self._store_valid_rows(number, found, at, data)
        finally:
            lock.release()
        return found

    def _lock(self, number: int) -> threading.Lock:
        # Of this process: a lock that is held at a fork stays locked in the child.
        return self._locks.setdefault((os.getpid(), number), threading.Lock())

    def _open_local(self, number: int) -> OpenedShard | None:
        sha256 = self._files[number].sha256
        for path in (self._cache.file(sha256), self._cache.part(sha256)):
            try:
                offset = self._checked(number, path).offset
                identity = self._mapping.attach(
                    number,
                    path,
                    num_bytes=self._files[number].num_bytes,
                    offset=offset,
                    rows=self._num_rows[number],
                )
                # A folder with all bytes can be one that is only read.
                with contextlib.suppress(OSError):
                    os.utime(path)
            except FileNotFoundError:
                continue
            except PatchcacheError:
                if path.exists():
                    # Left by a crash, or damaged since.
                    self._cache.delete(sha256)
                continue
            is_part = path.suffix == ".part"
            self._opened[number] = OpenedShard(path, is_part, identity, offset)
            return self._opened[number]
        return None

    def _checked(self, number: int, path: Path) -> Shard:
        """Check a file's structure, and its row hashes, which are not features."""
        with uninterrupted():
            shard = open_shard(path, self._spec)
        start = self._mapping.starts[number]
        if not np.array_equal(shard.row_xxh3, self._hashes[start:][: self._num_rows[number]]):
            raise CorruptShardError(f"{path}: its row hashes are not those in {INDEX_FILE}.")
        return shard

    def _request_structure(self, number: int) -> list[tuple[int, bytes]]:
        """Request all of a shard but its features, and make a part of it."""
        file = self._files[number]
        size = file.num_bytes
        # Both ends: the index does not say where in the file the features begin.
        end = size - self._num_rows[number] * self._row_bytes
        if end <= 0:
            raise self._corrupt(number, f"it cannot hold {self._num_rows[number]} rows")
        for attempt in range(1, MAX_COPIES + 1):
            pieces = [self._location.read(file, 0, end if 2 * end < size else size)]
            if len(pieces[0][1]) < size:
                pieces.append(self._location.read(file, size - end, size))
            try:
                self._stored(partial(self._make_part, number, pieces))
                return pieces
            except CacheError as error:
                if attempt == MAX_COPIES:
                    text = str(error).replace(REMEDY, "").strip()
                    raise type(error)(f"{text} {self._location.remedy}") from None
            time.sleep(network.BACK_OFF[attempt - 1])
        raise AssertionError("the last attempt returns or raises")

    def _make_part(self, number: int, pieces: list[tuple[int, bytes]]) -> None:
        file = self._files[number]
        try:
            with self._cache.new_part(file.sha256, file.num_bytes) as path:
                with path_in_errors(path), path.open("r+b") as part:
                    for at, data in pieces:
                        part.seek(at)
                        part.write(data)
                try:
                    self._checked(number, path)
                except CacheError as error:
                    if not path.exists():
                        raise FileNotFoundError from None
                    text = str(error).replace(str(path), self._location.where(file.name))
                    raise type(error)(text) from None
        except FileNotFoundError:
            raise Evicted from None

    def _stored(self, write: Callable[[], None]) -> None:
        """Write to the folder; from a full disk, all shards that are not in use are deleted."""
        try:
            with self._cache.errors_explained():
                return write()
        except OSError as error:
            if error.errno not in FULL:
                raise
        self._shrink(limit=0)
        with self._cache.errors_explained():
            write()

    def _check_arrived(self, number: int, rows: NDArray[np.int64]) -> None:
        """Hold rows that a file of this machine has against their hashes."""
        opened, start = self._opened[number], self._mapping.starts[number]
        if opened.is_part:
            sha256 = self._files[number].sha256
            rows = rows[self._cache.arrived(sha256, self._num_rows[number])[rows - start]]
        came = [self._mapping.rows[row] for row in rows.tolist()]
        is_right = hash_rows(came) == self._hashes[rows]
        self._states.set_ready(rows[is_right])
        if not (opened.is_part or is_right.all()):
            self._cache.delete(self._files[number].sha256)
            self._states.deleted([number])
            raise Evicted
        self._finish(number)

    def _request_rows(self, number: int, rows: NDArray[np.int64]) -> None:
        """Request rows that follow each other until their bytes are right."""
        file, opened = self._files[number], self._opened[number]
        whole = self._location.remote is not None and self._location.remote.ignores_ranges
        # A server that sends whole files sends each of them once.
        with self._lock(number) if whole else contextlib.nullcontext():
            for attempt in range(1, MAX_COPIES + 1):
                rows = rows[self._states.of_row[rows] != READY]
                if not len(rows):
                    return
                if attempt > 1:
                    time.sleep(network.BACK_OFF[attempt - 2])
                first, last = rows[[0, -1]] - self._mapping.starts[number]
                start, stop = (opened.offset + int(n) * self._row_bytes for n in (first, last + 1))
                self._store_valid_rows(number, opened, *self._location.read(file, start, stop))
            rows = rows[self._states.of_row[rows] != READY]
            if len(rows):
                raise self._corrupt(number, f"{len(rows)} rows have another hash than {INDEX_FILE}")

    def _store_valid_rows(self, number: int, opened: OpenedShard, at: int, data: bytes) -> None:
        """Write those rows to a part that are missing and whose bytes are right.

        Args:
            number: Of the shard.
            opened: The part.
            at: Where the bytes begin in the file.
            data: The bytes.
        """
        num_rows, size = self._num_rows[number], self._row_bytes
        first = max(0, -((opened.offset - at) // size))
        stop = min(num_rows, (at + len(data) - opened.offset) // size)
        if stop <= first:
            return
        begin = opened.offset + first * size - at
        came = np.frombuffer(data, np.uint8, (stop - first) * size, begin).reshape(-1, size)
        rows = self._mapping.starts[number] + np.arange(first, stop)
        is_new = self._states.of_row[rows] != READY
        is_new[is_new] = hash_rows(came[is_new]) == self._hashes[rows[is_new]]
        edges = np.flatnonzero(np.diff(is_new, prepend=False, append=False)).reshape(-1, 2)
        for begin, end in edges.tolist():
            self._stored(partial(self._write, number, opened, first + begin, came[begin:end]))
            self._states.set_ready(rows[begin:end])
        if self._cache.wrote(int(is_new.sum()) * size):
            self._shrink()

    def _write(self, number: int, opened: OpenedShard, first: int, came: NDArray[np.uint8]) -> None:
        try:
            with path_in_errors(opened.path), opened.path.open("r+b") as part:
                status = os.fstat(part.fileno())
                if (status.st_dev, status.st_ino) != opened.identity:
                    raise FileNotFoundError
                part.seek(opened.offset + first * self._row_bytes)
                part.write(came.data)
            self._cache.note_rows(self._files[number].sha256, first, b"\1" * len(came))
        except FileNotFoundError:
            self._states.deleted([number])
            raise Evicted from None

    def _finish(self, number: int) -> None:
        """Complete a shard, in the background, once all of its rows are right."""
        if number in self._incomplete and (self._states.rows_of(number) == READY).all():
            if self._opened[number].is_part:
                self._submit_later(CHECK, RemoteShards._complete, number)
            else:
                self._note_complete(number)

    def _complete(self, number: int) -> None:
        """Hold a shard that has all rows against its sha256, and give it its final name."""
        file = self._files[number]
        with self._states.using(np.array([number]), wait=False), self._lock(number):
            opened = self._opened.get(number)
            is_whole = (self._states.rows_of(number) == READY).all()
            if not (opened and opened.is_part and is_whole):
                # Deleted since, maybe begun again: it is queued again when it has all rows.
                return
            try:
                found = sha256_of(opened.path)
                status = opened.path.stat()
                if (status.st_dev, status.st_ino) != opened.identity:
                    # Another process deleted it, and began it again.
                    raise FileNotFoundError
                if found == file.sha256:
                    self._cache.complete(file.sha256)
            except FileNotFoundError:
                self._states.deleted([number])
                return
            if found == file.sha256:
                path = self._cache.file(file.sha256)
                self._opened[number] = replace(opened, path=path, is_part=False)
                self._note_complete(number)
                return
            # Its rows are right, so it is damaged between them, maybe on its way.
            self._num_refusals[number] = self._num_refusals.get(number, 0) + 1
            if self._num_refusals[number] == MAX_COPIES:
                self._refused[number] = self._corrupt(
                    number, f"its sha256 is {found}, {INDEX_FILE} has {file.sha256}"
                )
            self._cache.delete(file.sha256)
            self._states.deleted([number])

    def _note_complete(self, number: int) -> None:
        with self._states.changed:
            self._incomplete.discard(number)
            is_whole = not (self._incomplete or self._states.any_deleted)
            self.all_here = is_whole and self._fits

    def _shrink(self, limit: int | None = None) -> None:
        """Keep the limit, and unmap shards whose files were deleted, here or by others."""
        opened = list(self._opened)
        in_use = {self._files[number].sha256 for number in self._states.in_use().tolist()}
        left = self._cache.shrink(in_use, limit)
        gone = [number for number in opened if self._files[number].sha256 not in left]
        with self._states.changed:
            if not self.all_here:
                self._states.deleted(gone)

    def _touch(self, numbers: NDArray[np.int64]) -> None:
        now = time.monotonic()
        for number in numbers[now - self._touched[numbers] > TOUCH_SECONDS].tolist():
            if opened := self._opened.get(number):
                self._touched[number] = now
                with contextlib.suppress(OSError):
                    os.utime(opened.path)

    def _corrupt(self, number: int, detail: str) -> CorruptShardError:
        url = self._location.where(self._files[number].name)
        return CorruptShardError(
            f"{url}: {detail}. It was damaged or changed. {self._location.remedy}"
        )
