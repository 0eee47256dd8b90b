"""Finds the row of an image's features by the image's id.

Dense ids, such as COCO's, are looked up in a table over their whole range: one access to memory for
an id, where a binary search over a million ids takes ten that miss the processor's cache. Sparse
ids are found by binary search.
"""

import numpy as np
from numpy.typing import NDArray

MAX_SPREAD = 6
"""Most entries of the table for each id, of 4 bytes each. COCO's ids have 4.9."""

UNKNOWN = -1
"""Row of an id that is not in the store."""


class IdLookup:
    """Maps image ids to rows."""

    def __init__(self, image_ids: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        """Build the table, if the ids are dense.

        Args:
            image_ids: int64 [N], ascending; not copied, and made read-only.
            rows: int64 [N], 0 or more.
        """
        self.image_ids = image_ids
        self.image_ids.flags.writeable = False
        if len(rows) and rows.max() <= np.iinfo(np.int32).max:
            rows = rows.astype(np.int32)
        self._rows, self._table = rows, None
        if len(rows) and int(image_ids[-1]) - int(image_ids[0]) < MAX_SPREAD * len(rows):
            self._first = image_ids[0]
            # One sentinel entry at the end: every id outside the range is clamped to it.
            table = np.full(int(image_ids[-1] - self._first) + 2, UNKNOWN, rows.dtype)
            table[image_ids - self._first] = rows
            self._rows, self._table = rows[:0], table

    def rows_of(self, image_ids: NDArray[np.int64]) -> NDArray[np.integer]:
        """Return the row of each image: [B], UNKNOWN for an id that is not in the store."""
        if self._table is not None:
            # As unsigned numbers, ids below the first lie beyond the last, too.
            places = (image_ids - self._first).view(np.uint64)
            np.minimum(places, len(self._table) - 1, out=places)
            rows: NDArray[np.integer] = self._table.take(places.view(np.int64))
            return rows
        if not len(self.image_ids):
            return np.full(image_ids.shape, UNKNOWN)
        found = np.searchsorted(self.image_ids, image_ids)
        is_known = self.image_ids.take(found, mode="clip") == image_ids
        return np.where(is_known, self._rows.take(found, mode="clip"), UNKNOWN)
