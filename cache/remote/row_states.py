"""Which rows of remote shards can be read, which are on their way, and which shards are in use.

A shard in use is not unmapped. One whose file was deleted, to keep a limit, is unmapped when its
last use ends; its rows are then fetched again.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

UNKNOWN, PENDING, READY = range(3)
"""Of a row: not checked in this process; being fetched or checked; checked and mapped."""


class Evicted(Exception):
    """The file of a shard was deleted while it was used: it has to be opened again."""


class RowStates:
    """The states of all rows of a store, for the threads of this process."""

    def __init__(
        self,
        num_states: int,
        starts: NDArray[np.int64],
        num_rows: Sequence[int],
        unmap: Callable[[int], None],
    ) -> None:
        """Know no row yet.

        Args:
            num_states: Length of the array of all rows.
            starts: Position in it of each shard's first row.
            num_rows: Of each shard.
            unmap: Called for a shard that is not in use and whose file was deleted.
        """
        self.of_row = np.zeros(num_states, np.uint8)
        self.starts, self._num_rows, self._unmap = starts, num_rows, unmap
        self._is_deleted = np.zeros(len(num_rows), bool)
        self.is_ahead = np.zeros(len(num_rows), bool)
        """Of each shard whether requests for all of its rows are queued."""
        self._reset()
        _all_states.add(self)

    def _reset(self) -> None:
        """Begin anew in a forked child: its parent's threads do not exist here."""
        self.changed = threading.Condition()
        self._uses = np.zeros(len(self._num_rows), np.int64)
        self.is_ahead[:] = False
        self.of_row[self.of_row == PENDING] = UNKNOWN
        for number in np.flatnonzero(self._is_deleted).tolist():
            self._forget(number)

    def numbers_of(self, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the number of each row's shard."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def number_of(self, row: int) -> int:
        """Return the number of a row's shard."""
        return int(self.numbers_of(np.array([row]))[0])

    def rows_of(self, number: int) -> NDArray[np.uint8]:
        """Return a view of the states of a shard's rows."""
        return self.of_row[self.starts[number] :][: self._num_rows[number]]

    @contextlib.contextmanager
    def using(self, numbers: NDArray[np.int64], *, wait: bool) -> Iterator[None]:
        """Keep shards mapped during the block.

        Args:
            numbers: Of the shards, without repeats.
            wait: Whether to wait for other users of a shard whose file was deleted.

        Raises:
            Evicted: The file of a shard was deleted, and `wait` is false.
        """
        with self.changed:
            if wait:
                self.changed.wait_for(lambda: not self._is_deleted[numbers].any())
            elif self._is_deleted[numbers].any():
                raise Evicted
            self._uses[numbers] += 1
        try:
            yield
        finally:
            with self.changed:
                self._uses[numbers] -= 1
                self._forget_deleted()

    def in_use(self) -> NDArray[np.int64]:
        """Return the numbers of the shards in use."""
        return np.flatnonzero(self._uses)

    @property
    def any_deleted(self) -> bool:
        """Whether a shard in use will be unmapped."""
        return bool(self._is_deleted.any())

    def deleted(self, numbers: Sequence[int]) -> None:
        """Note that the files of some shards were deleted."""
        with self.changed:
            self._is_deleted[numbers] = True
            self._forget_deleted()

    def _forget_deleted(self) -> None:
        for number in np.flatnonzero(self._is_deleted & (self._uses == 0)).tolist():
            self._forget(number)
        self.changed.notify_all()

    def _forget(self, number: int) -> None:
        self.rows_of(number)[:] = UNKNOWN
        self._is_deleted[number] = self.is_ahead[number] = False
        self._unmap(number)

    @contextlib.contextmanager
    def claimed(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Yield those rows that nobody fetches yet: they are this thread's during the block."""
        with self.changed:
            mine = rows[self.of_row[rows] == UNKNOWN]
            self.of_row[mine] = PENDING
        try:
            yield mine
        finally:
            with self.changed:
                self.of_row[mine[self.of_row[mine] == PENDING]] = UNKNOWN
                self.changed.notify_all()

    def set_ready(self, rows: NDArray[np.int64]) -> None:
        """Note that rows can be read."""
        with self.changed:
            self.of_row[rows] = READY
            self.changed.notify_all()

    def wait_for(self, rows: NDArray[np.int64]) -> None:
        """Wait until none of some rows is on its way."""
        with self.changed:
            self.changed.wait_for(lambda: not (self.of_row[rows] == PENDING).any())


_all_states: "weakref.WeakSet[RowStates]" = weakref.WeakSet()


def _after_fork() -> None:
    for states in list(_all_states):
        states._reset()


os.register_at_fork(after_in_child=_after_fork)
