"""Opens parquet files of other machines without risk to memory.

A page of a few bytes can unpack to gigabytes: by its compression, by a text in a dictionary that
many rows repeat, or by the length of a run. So the headers of all pages are read before any page,
and a file that would unpack to more memory than a real table of its size is refused.
"""

import contextlib
import io
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..errors import PatchcacheError
from ..texts import one_line
from .atomic import check_ordinary
from .foreign import reading_foreign_file
from .thrift import I64, LIST, read_struct, read_value, struct_fields, struct_list_length

MAX_FOOTER_BYTES = 1 << 24
"""The footer lists row groups, columns, and a store's shards: 100 bytes each."""

MAX_ENTRIES = 10_000
"""Most row groups, columns, or metadata keys."""

MAX_CHUNKS = 1 << 18
"""Most column chunks in a footer: row groups times columns."""

MAX_PAGES = 100_000
"""Most pages of all columns that are read; real ones have over a gigabyte."""

MAX_PAGE_BYTES = 1 << 26
"""Most bytes of an unpacked page. Writers end a page at a megabyte, or after 1000 long texts."""

MIN_BUDGET = 1 << 28
"""Bytes to which a file of any size may unpack."""

MAX_RATIO = 64
"""Unpacked bytes allowed for each byte of a larger file. Tables of images and captions reach 11,
yes-no questions from a template 39."""

VALUE_BYTES = 16
"""Bytes of a value in Arrow besides its text: levels, an offset, a number."""

ENTRY_BYTES = 64
"""Bytes that an entry of a dictionary counts, for the time to examine it."""

WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}

UNCOMPRESSED = 0
CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd"}
"""Arrow's names of parquet's compressions, of those that are the same in both."""

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3
PAGE_TYPE, UNPACKED_BYTES, PACKED_BYTES, DATA_HEADER, DATA_HEADER_V2 = 1, 2, 3, 5, 8
NUM_VALUES, ENCODING, ENCODING_V2 = 1, 2, 4
"""Field numbers of a page's header, from parquet.thrift of the Apache Parquet format."""


ROW_GROUPS, GROUP_CHUNKS, GROUP_ROWS, CHUNK_METADATA, CHUNK_DICTIONARY = 4, 1, 3, 3, 11
CHUNK_FIELDS = (4, 5, 9, 7)
"""Field numbers of the footer, a row group, a column chunk and its metadata: there codec, number of
values, offset of the first data page, and packed bytes."""

DICTIONARY_ENCODINGS = {2, 8}

ENCODINGS = DICTIONARY_ENCODINGS | {0, 3, 4, 5, 6, 9}
"""All but the delta encodings of texts, in which a text can grow with every row."""

OPTIONS = {
    "page_checksum_verification": True,
    "pre_buffer": False,
    "thrift_string_size_limit": MAX_FOOTER_BYTES,
    "thrift_container_size_limit": MAX_ENTRIES,
}
"""Options of `pq.ParquetFile` for a file of another machine."""

Refuse = Callable[[str], PatchcacheError]


@contextlib.contextmanager
def open_parquet(
    path: Path,
    schema: pa.Schema,
    refuse: Refuse,
    *,
    optional: Collection[str] = (),
    read_dictionary: Sequence[str] = (),
) -> Iterator[pq.ParquetFile]:
    """Open a table for reading, and refuse damage that shows up then or in the block.

    Args:
        path: Of the file.
        schema: Columns that will be read; the file may have others.
        refuse: Makes the error from a line that says what is wrong.
        optional: Columns of `schema` that the file may lack.
        read_dictionary: Columns of text that are read as dictionaries.

    Raises:
        PatchcacheError: From `refuse`.
        OSError: The system could not read the file.
    """
    with reading_foreign_file(refuse, path):
        check_ordinary(path, refuse)
        with path.open("rb") as pages:
            groups = read_footer(pages, refuse)
            with pq.ParquetFile(path, **OPTIONS) as file:
                metadata = file.metadata
                _check_columns(file.schema_arrow, schema, optional, refuse)
                budget = max(MIN_BUDGET, MAX_RATIO * os.fstat(pages.fileno()).st_size)
                PageBudget(metadata, groups, pages, refuse, budget).check(set(schema.names))
        with pq.ParquetFile(
            path, metadata=metadata, read_dictionary=list(read_dictionary), **OPTIONS
        ) as file:
            yield file


def read_columns(path: Path, schema: pa.Schema, refuse: Refuse) -> pa.Table:
    """Read whole columns without nulls; the errors are those of `open_parquet`."""
    with open_parquet(path, schema, refuse) as file:
        table = file.read(columns=schema.names, use_threads=False)
        check_values(table.columns, refuse)
        return table


def values_of(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """Return the numbers of a column without nulls.

    Arrow's `to_numpy` imports pandas for half a second, and drops an interruption meanwhile.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return np.from_dlpack(column)


def check_values(columns: Sequence[Any], refuse: Refuse) -> None:
    """Refuse arrays that hold a null, at whatever depth, or text that is no UTF-8.

    Raises:
        PatchcacheError: From `refuse`.
        pyarrow.ArrowInvalid: An array of invalid structure.
    """
    for column in columns:
        if isinstance(column, pa.ChunkedArray):
            check_values(column.chunks, refuse)
            continue
        column.validate(full=True)
        if column.null_count:
            raise refuse("it has nulls")
        if pa.types.is_list(column.type):
            check_values([column.flatten()], refuse)
        if pa.types.is_struct(column.type):
            check_values(column.flatten(), refuse)


@dataclass(frozen=True, slots=True)
class ColumnChunk:
    """The pages of a column in a row group, as the footer describes them."""

    codec: int
    num_values: int
    start: int
    """Offset of the first page."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are stored together."""

    num_rows: int
    chunks: list[ColumnChunk]
    """In the order of the schema's columns."""


def read_footer(file: BinaryIO, refuse: Refuse) -> list[RowGroup]:
    """Read the row groups in a table's footer; none if there is no footer, as Arrow will explain.

    Arrow aborts the whole process if it is asked for a damaged column chunk, so it is not asked.

    Raises:
        PatchcacheError: From `refuse`.
        ValueError: The footer is damaged.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    length = int.from_bytes(file.read(4), "little")
    if file.read(4) != b"PAR1":
        return []
    if length > MAX_FOOTER_BYTES:
        raise refuse(f"its footer has {length} bytes, wanted at most {MAX_FOOTER_BYTES}")
    if length + 8 > size:
        return []
    file.seek(size - 8 - length)
    footer, groups, num_chunks = io.BytesIO(file.read(length)), [], 0
    for field, kind in struct_fields(footer):
        if (field, kind) == (ROW_GROUPS, LIST):
            for _ in range(struct_list_length(footer)):
                groups.append(_row_group(footer, refuse))
                num_chunks += len(groups[-1].chunks)
                if num_chunks > MAX_CHUNKS:
                    raise refuse(f"it has more than {MAX_CHUNKS} column chunks")
        else:
            read_value(footer, kind)
    return groups


def _row_group(footer: BinaryIO, refuse: Refuse) -> RowGroup:
    num_rows, chunks = 0, []
    for field, kind in struct_fields(footer):
        if (field, kind) == (GROUP_CHUNKS, LIST):
            chunks = [
                _column_chunk(read_struct(footer), refuse)
                for _ in range(struct_list_length(footer))
            ]
        elif (field, kind) == (GROUP_ROWS, I64):
            num_rows = read_value(footer, kind)
        else:
            read_value(footer, kind)
    return RowGroup(num_rows, chunks)


def _column_chunk(chunk: dict[int, Any], refuse: Refuse) -> ColumnChunk:
    about = chunk.get(CHUNK_METADATA)
    if not isinstance(about, dict):
        raise refuse("a column of it is encrypted, or lies in another file")
    found: list[Any] = [about.get(field) for field in CHUNK_FIELDS]
    # A writer without dictionaries may leave their offset out, or write 0.
    offsets = [offset for offset in (about.get(CHUNK_DICTIONARY), found[2]) if offset]
    if not all(type(value) is int for value in (*found, *offsets)):
        raise refuse(f"a column of it has the sizes {found}")
    codec, num_values, first_page, num_bytes = found
    return ColumnChunk(codec, num_values, min(offsets, default=first_page), num_bytes)


def _check_columns(
    found: pa.Schema, wanted: pa.Schema, optional: Collection[str], refuse: Refuse
) -> None:
    needed = [f for f in wanted if f.name in found.names or f.name not in optional]
    types = {field.name: field.type for field in found}
    if any(types.get(field.name) != field.type for field in needed):
        raise refuse(f"its columns are {_listed(found)}, wanted {_listed(wanted)}")


def _listed(schema: pa.Schema) -> str:
    return one_line(", ".join(f"{field.name!r} {field.type}" for field in schema))


class PageBudget:
    """Adds up the memory to which the pages of a file can unpack, and refuses too much."""

    def __init__(
        self,
        metadata: pq.FileMetaData,
        groups: Sequence[RowGroup],
        pages: BinaryIO,
        refuse: Refuse,
        most_bytes: int,
        most_page_bytes: int = MAX_PAGE_BYTES,
    ) -> None:
        """Spend nothing yet.

        Args:
            metadata: The file's footer as Arrow reads it, for the schema.
            groups: The row groups in it.
            pages: The file.
            refuse: Makes the error from a line that says what is wrong.
            most_bytes: Limit of all pages together, unpacked.
            most_page_bytes: Limit of a page, packed or unpacked.
        """
        self._metadata, self._groups = metadata, groups
        self._pages, self._refuse = pages, refuse
        self._most_bytes, self._most_page_bytes = most_bytes, most_page_bytes
        self._num_bytes = self._num_pages = 0

    def check(self, names: set[str], groups: Iterable[int] | None = None) -> None:
        """Add up all pages of some columns.

        Args:
            names: Of columns, or paths such as `image.bytes` of the parts of a struct.
            groups: Numbers of the row groups; without it, all.

        Raises:
            PatchcacheError: From `refuse`.
        """
        self._spend(max(0, self._metadata.num_rows) * VALUE_BYTES)
        self._num_bytes = 0
        columns = map(self._metadata.schema.column, range(self._metadata.num_columns))
        wanted = [
            (number, column)
            for number, column in enumerate(columns)
            if {column.path, column.path.partition(".")[0]} & names
        ]
        for group in range(len(self._groups)) if groups is None else groups:
            chunks = self._groups[group].chunks
            if len(chunks) != self._metadata.num_columns:
                raise self._refuse(f"a row group has {len(chunks)} columns")
            for number, column in wanted:
                self._check_chunk(chunks[number], column)

    def _check_chunk(self, chunk: ColumnChunk, column: Any) -> None:
        if chunk.num_values <= 0:
            # Arrow reads no page of it, and there may be none.
            return
        longest = WIDTHS.get(column.physical_type, max(0, column.length or 0))
        start, end = chunk.start, chunk.start + chunk.num_bytes
        while start < end:
            header, place = self._header_at(start)
            if header[PAGE_TYPE] == DICTIONARY_PAGE and column.physical_type == "BYTE_ARRAY":
                longest = max(longest, self._longest_text(header, chunk.codec))
            self._spend(self._unpacked_bytes(header, longest))
            start = place + header[PACKED_BYTES]

    def _header_at(self, start: int) -> tuple[dict[int, Any], int]:
        """Return a page's header, and the offset of the bytes behind it."""
        self._num_pages += 1
        if self._num_pages > MAX_PAGES:
            raise self._refuse(f"it has more than {MAX_PAGES} pages")
        self._pages.seek(start)
        header = read_struct(self._pages)
        sizes = header.get(UNPACKED_BYTES), header.get(PACKED_BYTES)
        if header.get(PAGE_TYPE) is None or not all(
            isinstance(size, int) and 0 <= size <= self._most_page_bytes for size in sizes
        ):
            raise self._refuse(
                f"a page of it unpacks from {sizes[1]} to {sizes[0]} bytes, wanted at most "
                f"{self._most_page_bytes}"
            )
        return header, self._pages.tell()

    def _longest_text(self, header: dict[int, Any], codec: int) -> int:
        """Read the dictionary page behind a header; return the bytes of its longest text."""
        size = header[UNPACKED_BYTES]
        data = self._pages.read(header[PACKED_BYTES])
        if codec in CODECS:
            data = pa.decompress(data, decompressed_size=size, codec=CODECS[codec])
        elif codec != UNCOMPRESSED:
            return int(size)
        view = memoryview(data)
        longest = entry = 0
        while entry < len(view):
            length = int.from_bytes(view[entry : entry + 4], "little")
            longest = max(longest, length)
            entry += 4 + length
            self._spend(ENTRY_BYTES)
        return longest

    def _unpacked_bytes(self, header: dict[int, Any], longest: int) -> int:
        """Return the most bytes that a page can take in Arrow."""
        is_v2 = header[PAGE_TYPE] == DATA_PAGE_V2
        unpacked: int = header[UNPACKED_BYTES]
        if header[PAGE_TYPE] != DATA_PAGE and not is_v2:
            return unpacked
        page = header.get(DATA_HEADER_V2 if is_v2 else DATA_HEADER)
        page = page if isinstance(page, dict) else {}
        num_values, encoding = page.get(NUM_VALUES), page.get(ENCODING_V2 if is_v2 else ENCODING)
        if not isinstance(num_values, int) or num_values < 0 or encoding not in ENCODINGS:
            raise self._refuse(f"a page of it has {num_values} values in the encoding {encoding}")
        values = num_values * longest if encoding in DICTIONARY_ENCODINGS else unpacked
        return values + num_values * VALUE_BYTES

    def _spend(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > self._most_bytes:
            raise self._refuse(
                f"it unpacks to more than {self._most_bytes >> 20} MiB, the limit for its size"
            )
