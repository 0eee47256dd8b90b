"""Reads structures of Thrift's compact protocol, the encoding of parquet's headers."""

from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_DEPTH = 8
"""Most levels of structures in structures; a page's header has three."""

MAX_FIELDS = 1000
"""Most fields of a structure."""

MAX_ENTRIES = 10_000
"""Most entries of a list: the footer of parquet lists row groups and columns."""

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)


def read_struct(file: BinaryIO, depth: int = 0) -> dict[int, Any]:
    """Read a structure: its values by field number, with None for texts and lists.

    Args:
        file: Positioned at the structure's start; afterwards at its end.
        depth: Number of structures around it.

    Raises:
        ValueError: Not a valid structure.
    """
    return {number: read_value(file, kind, depth) for number, kind in struct_fields(file)}


def struct_fields(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield number and kind of the fields of a structure; the caller reads each value.

    Raises:
        ValueError: Not a valid structure.
    """
    number = 0
    for _ in range(MAX_FIELDS):
        header = _byte(file)
        if not header:
            return
        number = number + (header >> 4) if header >> 4 else _zigzag(file)
        yield number, header & 15
    raise ValueError("a Thrift structure has too many fields")


def struct_list_length(file: BinaryIO) -> int:
    """Read the start of a list of structures; the caller reads each of them.

    Raises:
        ValueError: The list is too long, or of other values.
    """
    length, kind = _list_start(file)
    if length and kind != STRUCT:
        raise ValueError("a Thrift list holds no structures")
    return length


def read_value(file: BinaryIO, kind: int, depth: int = 0) -> Any:
    """Read the value of a field; None for a text or list.

    Raises:
        ValueError: Not a valid value.
    """
    if depth > MAX_DEPTH:
        raise ValueError("Thrift structures are nested too deeply")
    if kind in (TRUE, FALSE):
        return kind == TRUE
    if kind == BYTE:
        return _byte(file)
    if kind in (I16, I32, I64):
        return _zigzag(file)
    if kind == STRUCT:
        return read_struct(file, depth + 1)
    if kind in (LIST, SET):
        return _skip_list(file, depth)
    if kind in (DOUBLE, BINARY):
        file.seek(8 if kind == DOUBLE else _varint(file), 1)
        return None
    raise ValueError(f"Thrift knows no field of kind {kind} here")


def _skip_list(file: BinaryIO, depth: int) -> None:
    length, kind = _list_start(file)
    for _ in range(length):
        # In a list, a truth value takes a byte.
        read_value(file, BYTE if kind in (TRUE, FALSE) else kind, depth + 1)


def _list_start(file: BinaryIO) -> tuple[int, int]:
    """Return the number of values in a list, and their kind."""
    header = _byte(file)
    length = header >> 4 if header >> 4 < 15 else _varint(file)
    if length > MAX_ENTRIES:
        raise ValueError("a Thrift list is too long")
    return length, header & 15


def _byte(file: BinaryIO) -> int:
    data = file.read(1)
    if not data:
        raise ValueError("a Thrift structure ends beyond the end of the file")
    return data[0]


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a Thrift number has too many digits")


def _zigzag(file: BinaryIO) -> int:
    value = _varint(file)
    return value >> 1 ^ -(value & 1)
