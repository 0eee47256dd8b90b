"""Reads the rows of CSV and TSV files.

The header decides the delimiter. A row that cannot be read is rejected by its line; a file whose
rows cannot be told apart is refused.
"""

import csv
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from pipeline.indexing.records import AnnotationFile, Entry, RecordError
from pipeline.indexing.texts.columns import Columns, describe_missing, has_columns

DELIMITERS = (",", ";", "\t", "|")

MAX_AGAIN = 1 << 26
"""Characters that are read again behind stray quotes, before the file is refused: every line can
open a quote that only the last one closes."""

MAX_CELL = 2**31 - 1
"""Characters of a cell; Python's own limit, 131,072, is less than a long text."""

_PICTURE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)

Line = tuple[int, str]
"""The number of a line, from 1, and its text with its end."""


def table_rows(file: AnnotationFile, path: Path, columns: Columns) -> Iterator[Entry]:
    """Yield the rows below the header of a file, each with the number of its first line.

    Args:
        file: The file, for error texts.
        path: Where it is on this machine.
        columns: The columns that the header must have.

    Raises:
        StageError: The file is not UTF-8, has no such header, or opens a quote that never ends.
    """
    csv.field_size_limit(MAX_CELL)
    lines = _lines(file, path)
    first = next((line for line in lines if line[1].strip()), None)
    if first is None:
        file.refuse("the file is empty")
    delimiter = _delimiter(file, first[1], columns)
    rows = _rows(file, chain([first], lines), delimiter)
    _, header = next(rows)
    names = [] if isinstance(header, RecordError) else [name.strip().lower() for name in header]
    if not has_columns(names, columns):
        file.refuse(f"its header cannot be read: {first[1].strip()[:200]!r}")
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        file.refuse(f"its header has the column {repeated[0]!r} twice")
    for number, cells in rows:
        record = f"{file.name}: line {number}"
        if isinstance(cells, RecordError):
            yield record, cells
        elif len(cells) != len(names):
            counts = f"{len(cells)} instead of {len(names)}"
            remedy = f"; quotes keep a text with {delimiter!r} in one cell"
            remedy = remedy if len(cells) > len(names) else ""
            yield record, RecordError(f"not as many cells as the header: {counts}{remedy}")
        else:
            yield record, dict(zip(names, cells, strict=True))


def _lines(file: AnnotationFile, path: Path) -> Iterator[Line]:
    try:
        # Any line end separates lines, and stays in the text, which may be a cell's.
        with path.open(encoding="utf-8-sig", newline="") as text:
            for line in enumerate(text, start=1):
                if "\0" in line[1]:
                    file.refuse(f"a zero byte in line {line[0]}; save the file as CSV in UTF-8")
                yield line
    except UnicodeDecodeError:
        file.refuse(f"not UTF-8: {_first_bad_line(path)}; save the file as CSV in UTF-8")


def _first_bad_line(path: Path) -> str:
    """Return which line of a file is not UTF-8, and why."""
    with path.open("rb") as data:
        for number, line in enumerate(data, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"byte 0x{line[error.start]:02x} in line {number}"
    raise AssertionError("called for a file that is not UTF-8")


def _delimiter(file: AnnotationFile, header: str, columns: Columns) -> str:
    """Return the delimiter with which a header has the columns."""
    by_delimiter = {sign: _header_names(header, sign) for sign in DELIMITERS}
    for sign, names in by_delimiter.items():
        if has_columns(names, columns):
            return sign
    found = max(by_delimiter.values(), key=len)
    reason = describe_missing(found, columns)
    if any(_PICTURE.search(name) for name in found):
        wanted = ",".join(names[0] for names in columns)
        reason += f". The file seems to have no header: put a first line such as {wanted} into it"
    file.refuse(reason)


def _header_names(header: str, delimiter: str) -> list[str]:
    cells = next(csv.reader([header], delimiter=delimiter), [])
    return [cell.strip().lower() for cell in cells]


def _rows(
    file: AnnotationFile, lines: Iterator[Line], delimiter: str
) -> Iterator[tuple[int, Sequence[str] | RecordError]]:
    """Yield the cells of each row and the number of its first line; empty lines are no rows."""
    source = _LineSource(lines)
    reader = csv.reader(source, delimiter=delimiter, strict=True)
    while True:
        source.start_row()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if source.is_at_end:
                file.refuse(f"the quote that line {source.row[0][0]} opens is never closed")
            yield source.row[0][0], RecordError(f"quotes that do not fit: {error}")
            # The lines after a stray quote may be rows of their own.
            source.go_back_behind_first()
            if source.num_again > MAX_AGAIN:
                file.refuse(f"too many stray quotes, the last in line {source.row[0][0]}")
            continue
        if cells is None:
            return
        if len(cells) > 1 or any(cell.strip() for cell in cells):
            yield source.row[0][0], cells


class _LineSource(Iterator[str]):
    """Hands lines to the parser, and keeps those of the row that it parses."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._again: deque[Line] = deque()
        self.row: list[Line] = []
        self.num_again = 0
        """Characters that were handed out again, or will be."""
        self.is_at_end = False
        """Whether the parser asked for more lines than there are."""

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines, None)
        if line is None:
            self.is_at_end = True
            raise StopIteration
        self.row.append(line)
        return line[1]

    def start_row(self) -> None:
        self.row = []

    def go_back_behind_first(self) -> None:
        self._again.extendleft(reversed(self.row[1:]))
        self.num_again += sum(len(text) for _, text in self.row[1:])
