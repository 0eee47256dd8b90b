"""Tells by content and suffix what kind of file a file of texts is, and yields its records.

The kinds: a JSON object as a whole, and records one after another from a JSON list, JSON lines, a
CSV or TSV, or parquet.
"""

import contextlib
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from cache.files.foreign import reading_foreign_file
from cache.files.parquet import MAX_RATIO, MIN_BUDGET, OPTIONS, PageBudget, read_footer
from pipeline.indexing.records import AnnotationFile, Entry, RecordError, parse_record_json
from pipeline.indexing.texts.columns import (
    CONVERSATIONS,
    ID,
    Columns,
    describe_missing,
    has_columns,
)
from pipeline.indexing.texts.delimited import table_rows
from pipeline.indexing.texts.json_list import list_entries
from workspace.errors import StageError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

PARQUET = b"PAR1"

OTHER_FORMATS = {
    b"PK\x03\x04": "a zip or an Excel workbook; unpack it, or save it as CSV in UTF-8",
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"\xff\xfe": "UTF-16 text; save it in UTF-8",
    b"\xfe\xff": "UTF-16 text; save it in UTF-8",
}
"""What files start with that are often given in place of a text, and what to do about each."""

NUM_EXAMINED = 100
"""Records by which the layout of a file is told."""

LONGEST_LINE = 1 << 24
"""Bytes of a first line that can be a record; a compact object as a whole is one line too."""

BATCH_ROWS = 4096


@contextlib.contextmanager
def open_entries(
    file: AnnotationFile, columns: Columns
) -> Iterator[dict[str, Any] | Iterator[Entry]]:
    """Yield a file's JSON object, or else an iterator over its records.

    Args:
        file: The file; it is read within the block.
        columns: The columns that a table must have.

    Raises:
        StageError: The file does not exist or is of no such kind, here or while its records are
            read.
    """
    with file.local() as path:
        yield _content(file, path, columns)


def _content(
    file: AnnotationFile, path: Path, columns: Columns
) -> dict[str, Any] | Iterator[Entry]:
    with path.open("rb") as data:
        start = data.read(4096)
    for signature, what in OTHER_FORMATS.items():
        if start.startswith(signature):
            file.refuse(what)
    if start.startswith(PARQUET):
        return _parquet_rows(file, path, columns)
    suffix = PurePosixPath(file.name).suffix.lower()
    first = start.removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if suffix in (".csv", ".tsv"):
        return table_rows(file, path, columns)
    if first == b"[":
        return list_entries(file, path)
    if suffix in (".jsonl", ".ndjson") or (first == b"{" and _first_line_is_object(path)):
        return _json_lines(file, path)
    if suffix == ".json" or first == b"{":
        value = file.json_of(path)
        return value if isinstance(value, dict) else file.refuse("neither an object nor a list")
    return table_rows(file, path, columns)


def _first_line_is_object(path: Path) -> bool:
    """Whether the first of several lines is a JSON object of its own."""
    with path.open("rb") as data:
        line = data.readline(LONGEST_LINE)
        if not line.endswith(b"\n") or not data.read(4096).strip():
            return False
    try:
        return isinstance(parse_record_json(line.decode("utf-8-sig")), dict)
    except (RecordError, UnicodeDecodeError):
        return False


def _json_lines(file: AnnotationFile, path: Path) -> Iterator[Entry]:
    with path.open("rb") as data:
        for number, line in enumerate(data, start=1):
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if not content.strip():
                continue
            record = f"{file.name}: line {number}"
            try:
                yield record, parse_record_json(content.decode())
            except UnicodeDecodeError as error:
                file.refuse(f"not UTF-8: byte 0x{content[error.start]:02x} in line {number}")
            except RecordError as error:
                yield record, error


def _parquet_rows(file: AnnotationFile, path: Path, columns: Columns) -> Iterator[Entry]:
    def refuse(why: str) -> StageError:
        return StageError(f"{file.key}: {file.path}: not usable parquet: {why}. {file.remedy}")

    with reading_foreign_file(refuse, path), pq.ParquetFile(path, **OPTIONS) as table:
        schema = table.schema_arrow
        for name in columns[0]:
            if name in schema.names and not _is_text(schema.field(name).type):
                file.refuse(f"column {name!r} holds {schema.field(name).type}, wanted file names")
        wanted = {ID, CONVERSATIONS}.union(*columns)
        names = [name for name in schema.names if name in wanted]
        if not names:
            file.refuse(describe_missing(schema.names, columns))
        with path.open("rb") as pages:
            groups = read_footer(pages, refuse)
            budget = max(MIN_BUDGET, MAX_RATIO * path.stat().st_size)
            PageBudget(table.metadata, groups, pages, refuse, budget).check(set(names))
        row = 0
        for batch in table.iter_batches(BATCH_ROWS, columns=names):
            for entry in batch.to_pylist():
                yield f"{file.name}: row {row}", entry
                row += 1


def _is_text(column: Any) -> bool:
    values = column.value_type if pa.types.is_dictionary(column) else column
    return bool(pa.types.is_string(values) or pa.types.is_large_string(values))


def layout_of(
    file: AnnotationFile, entries: Iterator[Entry], columns: Columns
) -> tuple[Literal["conversations", "table"], Iterator[Entry]]:
    """Return whether records are LLaVA's or the rows of a table, and all the records.

    Raises:
        StageError: The first records are neither.
    """
    examined = list(islice(entries, NUM_EXAMINED))
    objects = [entry for _, entry in examined if isinstance(entry, dict)]
    if any(CONVERSATIONS in entry for entry in objects):
        return "conversations", chain(examined, entries)
    if not examined or any(has_columns(entry, columns) for entry in objects):
        return "table", chain(examined, entries)
    if not objects:
        record, entry = examined[0]
        found = entry if isinstance(entry, RecordError) else type(entry).__name__
        file.refuse(f"no object among its first records ({record}: {found})")
    file.refuse(
        f"no {CONVERSATIONS!r} as in LLaVA's files, and {describe_missing(objects[0], columns)}"
    )
