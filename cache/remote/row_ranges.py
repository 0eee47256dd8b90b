"""Which rows of remote shards are requested together.

A batch in random order is many rows that lie apart: they are joined where little lies between them.
Of a shard that is fetched whole, every row brings those around it, since they are wanted next.
"""

import numpy as np
from numpy.typing import NDArray

from .row_states import UNKNOWN, RowStates

REQUEST_BYTES = 8 << 20
"""Most bytes of a request: enough that its round trip counts for little, few enough that a lost
connection costs little and that the rows of a shard come over several connections."""

GAP_BYTES = 256 << 10
"""Two ranges are requested as one if so many missing bytes or fewer lie between them: a request
costs a client about as much time as these bytes, and an epoch needs the rows between them too."""


class RowRanges:
    """Ranges of the rows of one store, by what is known of each row."""

    def __init__(self, states: RowStates, row_bytes: int) -> None:
        """Keep the arguments."""
        self._states, self._row_bytes = states, row_bytes

    @property
    def _most(self) -> int:
        """Most rows of a request."""
        return max(1, REQUEST_BYTES // self._row_bytes)

    def joined(self, rows: NDArray[np.int64]) -> list[slice]:
        """Join ascending rows to ranges, each of one request."""
        if not len(rows):
            return []
        states, numbers = self._states.of_row, self._states.numbers_of(rows)
        found = [slice(int(rows[0]), int(rows[0]) + 1)]
        for row, before, number in zip(rows[1:].tolist(), numbers, numbers[1:], strict=False):
            run = found[-1]
            if (
                number == before
                and row - run.start < self._most
                and (row - run.stop) * self._row_bytes <= GAP_BYTES
                and not states[run.stop : row].any()
            ):
                found[-1] = slice(run.start, row + 1)
            else:
                found.append(slice(row, row + 1))
        return found

    def with_whole_requests(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add to rows of shards that are fetched whole the missing rows of the same requests.

        Otherwise a gather would take single rows out of requests that are queued: it would send
        many small requests, and the large ones would be sent as well.

        Args:
            rows: Ascending, all of them missing.

        Returns:
            Missing rows, ascending.
        """
        numbers = self._states.numbers_of(rows)
        is_whole = self._states.is_ahead[numbers]
        parts = (rows - self._states.starts[numbers]) // self._most
        found = [rows[~is_whole]]
        for number, part in np.unique(np.stack((numbers, parts))[:, is_whole], axis=1).T.tolist():
            first = part * self._most
            states = self._states.rows_of(number)[first : first + self._most]
            found.append(self._states.starts[number] + first + np.flatnonzero(states == UNKNOWN))
        return np.sort(np.concatenate(found))
