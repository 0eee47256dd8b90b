"""The result file of a run with a time budget: written after every row.

A run that is cut off leaves what it had. A row that does not fit in the time left is skipped, a row
that fails is recorded with its error, and the next row runs.
"""

import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cache.files.atomic import write_json
from cache.texts import one_line

Row = dict[str, Any]
"""What was measured; or `error`, or `skipped`, and why."""

Rows = dict[str, Row]


class Report:
    """Rows by part, with the file that holds them."""

    def __init__(
        self,
        path: Path,
        *,
        seconds: float,
        about: dict[str, Any],
        conclude: Callable[[dict[str, Rows]], dict[str, Any]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the time budget; an older file stays until the first row is there.

        Args:
            path: The result file; replaced whenever there is something new.
            seconds: Time budget of all rows together.
            about: First entries of the file.
            conclude: Computes the last entries of the file from the rows so far.
            clock: Seconds since any moment.
        """
        self.rows: dict[str, Rows] = {}
        self._path, self._about, self._conclude = path, about, conclude
        self._seconds, self._clock = seconds, clock
        self._started = clock()

    @property
    def seconds_left(self) -> float:
        """Seconds until the time budget is spent."""
        return self._seconds - (self._clock() - self._started)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Collect the rows of the block under a name; an error outside of rows ends the block."""
        started = self._clock()
        self.rows[name] = {}
        print(f"\n{name} ({self.seconds_left:.0f} s left)", flush=True)
        row: Row = {}
        try:
            yield
        # Whatever broke, the next part may work.
        except Exception as error:
            row = _failure(error)
        row["seconds"] = round(self._clock() - started, 1)
        self._add("whole part", row)

    def row(self, name: str, estimate: float, measure: Callable[[], Row]) -> Row | None:
        """Measure a row of the current part, unless too little time is left.

        Args:
            name: Of the row.
            estimate: Seconds that it takes.
            measure: Returns what the file says of it.

        Returns:
            The measured row; None if it was skipped or failed.
        """
        left = self.seconds_left
        if estimate > left:
            self.skip(name, f"takes about {estimate:.0f} s, {max(left, 0):.0f} s are left")
            return None
        started = self._clock()
        is_measured = True
        try:
            row = measure()
            # The file holds no NaN, so a row with one has failed.
            json.dumps(row, allow_nan=False)
        # Out of memory, a kernel that does not compile: the next row may work.
        except Exception as error:
            row, is_measured = _failure(error), False
        free_gpu_memory()
        row = {**row, "row_seconds": round(self._clock() - started, 1)}
        self._add(name, row)
        return row if is_measured else None

    def skip(self, name: str, why: str) -> None:
        """Record a row that is not measured."""
        self._add(name, {"skipped": why})

    def _add(self, name: str, row: Row) -> None:
        part = next(reversed(self.rows))
        self.rows[part][name] = row
        print(f"  {name}: {', '.join(f'{key} {value}' for key, value in row.items())}", flush=True)
        self._write()

    def _write(self) -> None:
        seconds = round(self._clock() - self._started, 1)
        concluded = self._conclude(self.rows)
        write_json(self._path, {**self._about, "seconds": seconds, "parts": self.rows, **concluded})


def _failure(error: Exception) -> Row:
    return {"error": f"{type(error).__name__}: {one_line(error)}"}


def free_gpu_memory() -> None:
    """Return the memory of tensors that nothing holds any more; it helps after an error."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(rows: Rows | None, name: str) -> Row | None:
    """Return a row that was measured; None if it is missing, was skipped or failed."""
    row = (rows or {}).get(name)
    return None if row is None or "error" in row or "skipped" in row else row
