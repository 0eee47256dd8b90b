"""The image files in a parquet table, in the layout of the Hugging Face Hub.

The column `image` holds structs of `bytes` and `path`, or bytes alone. One row group is read at a
time, after a look at the headers of its pages: a few bytes can claim to unpack to gigabytes.
"""

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Collection, Sequence
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.files.parquet import (
    MAX_RATIO,
    MIN_BUDGET,
    OPTIONS,
    PageBudget,
    Refuse,
    RowGroup,
    read_footer,
)
from cache.texts import one_line
from pipeline.images.byte_file import ByteFile, OffsetReader
from pipeline.images.names import (
    ImageNameError,
    by_base_name,
    check_file_name,
    check_size,
    plain_name,
    reading_image,
)
from pipeline.images.zip_file import REMEDY
from workspace.errors import StageError

COLUMN = "image"
"""The column of the images; a table whose only column of images has another name is read too."""

MAX_GROUP_BYTES = (1 << 31) - 1
"""Most bytes of the images of a row group, packed or unpacked: the Hub's have 100 rows."""

MIN_ROWS = 1 << 20
"""Rows that a table of any size may claim; more rows need a byte each at least."""

MAX_CACHED_BYTES = 1 << 28
"""Bytes of row groups that a process holds for each pattern or table, besides the newest group."""


class PackedTable:
    """A parquet table with images: its names, and its columns by row group."""

    def __init__(self, file: ByteFile, *, key: str) -> None:
        """Read the footer; errors name the settings key.

        Raises:
            StageError: No readable parquet file, or its column of images is unclear.
        """
        self.file, self._key = file, key
        with reading_image(self._refuse, f"{key}: {file.address}"):
            self._num_bytes = file.size()
            self._metadata, self.schema, self._groups = _read_schema(file, self._refuse)
            self.column = self._image_column()
            sizes = [group.num_rows for group in self._groups]
            if min(sizes, default=0) < 0 or sum(sizes) > max(MIN_ROWS, self._num_bytes):
                raise self._refuse(f"{sum(sizes)} rows in {self._num_bytes} bytes")
        self.first_rows = np.cumsum([0, *sizes])
        """Number of the first row of each row group, and the number of all rows."""

    @property
    def num_groups(self) -> int:
        """Number of row groups."""
        return len(self._groups)

    @property
    def has_paths(self) -> bool:
        """Whether the images are structs that have a path."""
        kind = self.schema.field(self.column).type
        return bool(pa.types.is_struct(kind)) and kind.get_field_index("path") >= 0

    def _refuse(self, reason: str) -> StageError:
        return StageError(
            f"{self._key}: {self.file.address} is no readable parquet file of images ({reason}). "
            f"{REMEDY}"
        )

    def _image_column(self) -> str:
        names = self.schema.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise self._refuse(f"two columns are called {repeated[0]!r}")
        found = [field.name for field in self.schema if _holds_images(field.type)]
        # Arrow names the parts of a struct in this way.
        if clash := [n for n in names if n.rpartition(".")[0] in found]:
            raise self._refuse(f"the name of its column {clash[0]!r} can mean a part of another")
        if COLUMN in found:
            return COLUMN
        if len(found) == 1:
            return str(found[0])
        columns = one_line(", ".join(f"{field.name!r} {field.type}" for field in self.schema))
        raise self._refuse(
            f"its columns are {columns}; wanted a column {COLUMN!r} of bytes, or of structs of "
            f"bytes and path"
        )

    def names(self) -> list[str]:
        """Return the name of each row: its path if no other row has the path, else its number.

        Raises:
            StageError: The table cannot be read, or the network failed.
        """
        paths: list[str] = []
        if self.has_paths:
            for group in range(self.num_groups):
                column = pc.struct_field(self.read(f"{self.column}.path", group), "path")
                paths += [_usable(path) for path in column.to_pylist()]
        else:
            paths = [""] * int(self.first_rows[-1])
        numbers = set(map(str, range(len(paths))))
        counts = Counter(paths)
        return [
            path if path and counts[path] == 1 and path not in numbers else str(row)
            for row, path in enumerate(paths)
        ]

    def read(self, path: str, group: int, refuse: Refuse | None = None) -> pa.ChunkedArray:
        """Return a column in a row group, or a column of structs with one of their parts.

        Args:
            path: Name of the column or, for a part, such as `image.bytes`.
            group: Number of the row group.
            refuse: Makes the error about damage; without it, the whole table is refused.

        Raises:
            StageError: The table cannot be read, or unpacks to too much, or the network failed.
        """
        refuse = refuse or self._refuse
        name = path if path in self.schema.names else path.partition(".")[0]
        num_rows = int(self.first_rows[group + 1] - self.first_rows[group])
        with reading_image(refuse, f"{self._key}: {self.file.address}"):
            start, num_bytes = self._extent(path, group, refuse)
            stream = OffsetReader(self.file, self._num_bytes)
            stream.hold(start, num_bytes)
            budget = min(MAX_GROUP_BYTES, max(MIN_BUDGET, MAX_RATIO * num_bytes))
            pages = cast(BinaryIO, stream)
            PageBudget(
                self._metadata, self._groups, pages, refuse, budget, most_page_bytes=MAX_GROUP_BYTES
            ).check({path}, [group])
            stream.seek(0)
            with pq.ParquetFile(stream, metadata=self._metadata, **OPTIONS) as opened:
                table = opened.read_row_group(group, columns=[path], use_threads=False)
            column = table[name]
            column.validate(full=True)
            if len(column) != num_rows:
                raise refuse(f"a row group has {len(column)} rows, the footer says {num_rows}")
            return column

    def _extent(self, path: str, group: int, refuse: Refuse) -> tuple[int, int]:
        """Return offset and size of the pages of a column or part in a row group."""
        chunks = self._groups[group].chunks
        paths = [self._metadata.schema.column(n).path for n in range(self._metadata.num_columns)]
        if len(chunks) != len(paths):
            raise refuse(f"a row group has {len(chunks)} columns, the schema {len(paths)}")
        wanted = [
            chunk
            for found, chunk in zip(paths, chunks, strict=True)
            if path in (found, found.partition(".")[0])
        ]
        start = min(chunk.start for chunk in wanted)
        end = max(chunk.start + chunk.num_bytes for chunk in wanted)
        if not 0 <= start <= end <= self._num_bytes:
            raise refuse(f"a row group from byte {start} to {end}")
        if end - start > MAX_GROUP_BYTES:
            raise refuse(
                f"a row group of {end - start} bytes, wanted at most {MAX_GROUP_BYTES}; write it "
                f"with row_group_size=100"
            )
        return start, end - start


def _read_schema(
    file: ByteFile, refuse: Refuse
) -> tuple[pq.FileMetaData, pa.Schema, list[RowGroup]]:
    """Read the footer as Arrow reads it, and the row groups, of which Arrow is not asked."""
    with contextlib.closing(file.open()) as stream:
        groups = read_footer(stream, refuse)
        with pq.ParquetFile(stream, **OPTIONS) as opened:
            return opened.metadata, opened.schema_arrow, groups


def holds_images(file: ByteFile, *, key: str, names: Collection[str]) -> bool:
    """Whether a table has a column of image bytes under one of some names.

    Raises:
        StageError: The table cannot be read.
    """

    def refuse(reason: str) -> StageError:
        return StageError(f"{key}: {file.address} is no readable parquet file ({reason}). {REMEDY}")

    with reading_image(refuse, f"{key}: {file.address}"):
        _, schema, _ = _read_schema(file, refuse)
    return any(field.name in names and _holds_images(field.type) for field in schema)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _usable(path: object) -> str:
    """Return a path as a name below the table, empty if it is none."""
    name = plain_name(path) if isinstance(path, str) else ""
    with contextlib.suppress(ImageNameError):
        check_file_name(name)
        return name
    return ""


class GroupCache:
    """The newest row groups of some tables, up to a number of bytes, in one process."""

    def __init__(self) -> None:
        """Hold nothing."""
        self._groups: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()

    def get(self, address: str, group: int) -> pa.ChunkedArray | None:
        """Return a row group, if it is held."""
        found = self._groups.get((address, group))
        if found is not None:
            self._groups.move_to_end((address, group))
        return found

    def add(self, address: str, group: int, images: pa.ChunkedArray) -> None:
        """Hold a row group, and let go of the oldest ones."""
        self._groups[address, group] = images
        while len(self._groups) > 1 and self._num_bytes() > MAX_CACHED_BYTES:
            self._groups.popitem(last=False)

    def _num_bytes(self) -> int:
        return sum(images.nbytes for images in self._groups.values())

    def __getstate__(self) -> dict[str, object]:
        return {"_groups": OrderedDict()}


class ImageParquet:
    """The images in a parquet table; the list of names is kept where the table is pickled."""

    def __init__(self, file: ByteFile, *, key: str, cache: GroupCache) -> None:
        """Read the footer and the names; errors name the settings key.

        Raises:
            StageError: The table cannot be read, or is empty.
        """
        self._table = PackedTable(file, key=key)
        self._cache = cache
        self.path = file.address
        self._real_path = file.real_path
        self._rows = {name: row for row, name in enumerate(self._table.names())}
        if not self._rows:
            raise StageError(f"{key}: {self.path} is an empty table, wanted images in it.")
        self._names: dict[str, list[str]] | None = None

    def has(self, name: str) -> bool:
        """Whether a row has this name."""
        return name in self._rows

    def names(self, base_name: str) -> Sequence[str]:
        """Return the names of all rows with this base name, sorted."""
        if self._names is None:
            self._names = by_base_name(self._rows)
        return self._names.get(base_name, ())

    def all_names(self) -> list[str]:
        """Return the names of all rows, in their order."""
        return list(self._rows)

    def real_path(self, name: str) -> str:
        """Return the table's path with all links resolved, followed by the row's name."""
        return f"{self._real_path}/{name}"

    def read(self, name: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageNameError: The row holds no bytes or too many, or its row group is damaged.
            StageError: The disk, the network or the machine failed.
        """
        row = self._rows[name]
        group = int(np.searchsorted(self._table.first_rows, row, side="right")) - 1
        value = self._group(name, group)[row - int(self._table.first_rows[group])]
        if isinstance(value, pa.StructScalar):
            value = value["bytes"] if value.is_valid else pa.scalar(None, pa.binary())
        if not value.is_valid:
            raise ImageNameError(f"{name!r} in {self.path} holds no bytes")
        check_size(name, value.as_buffer().size)
        return bytes(value.as_py())

    def _group(self, name: str, group: int) -> pa.ChunkedArray:
        images = self._cache.get(self.path, group)
        if images is None:
            where = f"{name!r} in {self.path}"
            column = self._table.column
            is_struct = pa.types.is_struct(self._table.schema.field(column).type)
            images = self._table.read(
                f"{column}.bytes" if is_struct else column,
                group,
                lambda reason: ImageNameError(f"{where}: its row group is damaged: {reason}"),
            )
            self._cache.add(self.path, group, images)
        return images
