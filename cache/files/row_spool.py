"""Rows of equal size in one file, in order of arrival, each with a record in another file.

A row is written before its record, so that after a kill at any moment each record has its row. The
record carries the row's hash: a row that the disk has lost is found when the file is opened again.

Letters: N rows asked for, P patches, D width.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptShardError, SettingsError
from .atomic import check_writable_in_place, path_in_errors

RECORD = np.dtype([("image_id", "<i8"), ("source_xxh3", "<u8"), ("row_xxh3", "<u8")])

ROWS, RECORDS = "rows", "records"
"""File names."""


class RowSpool:
    """The spool of a folder, open for appending and reading until the end of its `with` block."""

    def __init__(self, folder: Path, patches: int, width: int) -> None:
        """Open the files, and cut off what a kill left of a last row.

        Args:
            folder: Exists; the files in it are made if needed.
            patches: P of every row.
            width: D of every row.

        Raises:
            SettingsError: A file is a link, or no ordinary file.
        """
        self._paths = folder / ROWS, folder / RECORDS
        for path in self._paths:
            check_writable_in_place(path, SettingsError)
        self._shape = patches, width
        self._row_bytes = patches * width * 2
        self._records: dict[int, tuple[int, int, int]] = {}
        held = intact_rows(folder, self._row_bytes)
        sizes = len(held) * self._row_bytes, len(held) * RECORD.itemsize
        for path, num_bytes in zip(self._paths, sizes, strict=True):
            with path_in_errors(path):
                path.touch()
                os.truncate(path, num_bytes)
        for place, record in enumerate(held):
            if record is not None:
                self._records[record[0]] = (place, record[1], record[2])
        self._num_rows = len(held)
        self._files = [path.open("r+b") for path in self._paths]

    def __enter__(self) -> "RowSpool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files:
            file.close()

    def source_xxh3(self, image_id: int) -> int | None:
        """Return the hash of the image file of which the spool has a row; None without a row."""
        record = self._records.get(image_id)
        return None if record is None else record[1]

    def append(self, image_id: int, source_xxh3: int, row_PD: NDArray[np.float16]) -> None:
        """Add a row; an earlier row of the same image does not count any more.

        Args:
            image_id: Of the image.
            source_xxh3: xxh3_64 of the image file's bytes.
            row_PD: float16 [P, D], little-endian and C-contiguous.

        Raises:
            OSError: The row cannot be written; names the file.
        """
        row_xxh3 = xxhash.xxh3_64_intdigest(row_PD.data)
        record = np.array([(image_id, source_xxh3, row_xxh3)], RECORD)
        # Bytes of a write that failed are overwritten by the next one.
        sizes = self._num_rows * self._row_bytes, self._num_rows * RECORD.itemsize
        for path, file, start, data in zip(
            self._paths, self._files, sizes, (row_PD, record), strict=True
        ):
            with path_in_errors(path):
                file.seek(start)
                file.write(data.tobytes())
                file.flush()
        self._records[image_id] = (self._num_rows, source_xxh3, row_xxh3)
        self._num_rows += 1

    def images(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return the id and the hash of the file of every image, in no order: [N] and [N]."""
        count = len(self._records)
        sources = (record[1] for record in self._records.values())
        return (
            np.fromiter(self._records, np.int64, count),
            np.fromiter(sources, np.uint64, count),
        )

    def gather(self, image_ids: Sequence[int]) -> NDArray[np.float16]:
        """Read the rows of some images: float16 [N, P, D].

        Raises:
            CorruptShardError: A row is not the one that was written.
        """
        rows_NPD = np.empty((len(image_ids), *self._shape), "<f2")
        path, file = self._paths[0], self._files[0]
        records = [self._records[image_id] for image_id in image_ids]
        # In the order of the file, as a disk likes it.
        for number in sorted(range(len(records)), key=records.__getitem__):
            place, _, row_xxh3 = records[number]
            row: NDArray[Any] = rows_NPD[number].reshape(-1).view(np.uint8)
            with path_in_errors(path):
                file.seek(place * self._row_bytes)
                num_read = file.readinto(row.data)
            if num_read != self._row_bytes or xxhash.xxh3_64_intdigest(row.data) != row_xxh3:
                raise CorruptShardError(
                    f"{path}: the row of image {image_ids[number]} is not the one that was "
                    f"written: check the disk. Run the same program again: it writes that row anew."
                )
        return rows_NPD


def intact_rows(folder: Path, row_bytes: int) -> list[tuple[int, int, int] | None]:
    """Read the records of a spool and hold every row against its hash.

    Args:
        folder: Of the spool; without files, it has no rows.
        row_bytes: Size of a row.

    Returns:
        Image id, hash of the image file and hash of the row, in order of arrival; None for a row
        that is damaged. A row or record that is not whole is left out.
    """
    paths = folder / ROWS, folder / RECORDS
    if not all(path.is_file() for path in paths):
        return []
    with path_in_errors(paths[1]):
        data = paths[1].read_bytes()
    count = min(paths[0].stat().st_size // row_bytes, len(data) // RECORD.itemsize)
    records = np.frombuffer(data, RECORD, count).tolist()
    found: list[tuple[int, int, int] | None] = []
    with path_in_errors(paths[0]), paths[0].open("rb") as file:
        for record in records:
            is_intact = xxhash.xxh3_64_intdigest(file.read(row_bytes)) == record[2]
            found.append(record if is_intact else None)
    return found
