"""Examines the object headers of an HDF5 file before HDF5 does.

Old or large groups keep their links in trees, and HDF5 crashes on a tree that leads back into
itself. A shard has no tree: the few links and attributes of its root are in the root's header.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SIGNATURE = b"\x89HDF\r\n\x1a\n"

SUPERBLOCK_BYTES = 48

UNDEFINED = b"\xff" * 8
"""An address that leads nowhere."""

MAX_CHUNKS = 64
"""Most parts of an object's header; a writer makes one or two."""

MAX_CHUNK_BYTES = 1 << 18
"""Most bytes of such a part; an attribute has at most 64 KB."""

LINK_INFO, LINK, CONTINUATION, SYMBOL_TABLE, ATTRIBUTE_INFO = 0x02, 0x06, 0x10, 0x11, 0x15
"""Message types of a header, from section IV.A.2 of the HDF5 file format specification."""

TREES = {LINK_INFO: 8, ATTRIBUTE_INFO: 2}
"""Message types that can refer to a tree, and bytes of the optional counter before its address."""

Message = tuple[int, bytes]


def find_tree(path: Path) -> str | None:
    """Look for a tree that keeps links or attributes of the root, or of an object in the root.

    Args:
        path: Of the file.

    Returns:
        What is wrong; None if there is no tree, or if the file is not HDF5.

    Raises:
        ValueError: The headers are damaged.
    """
    with path.open("rb") as file:
        start = file.read(SUPERBLOCK_BYTES)
        if not start.startswith(SIGNATURE):
            return None
        if len(start) < SUPERBLOCK_BYTES:
            raise ValueError("it ends within its superblock")
        version, size_of_offsets, size_of_lengths = start[8:11]
        if version not in (2, 3) or (size_of_offsets, size_of_lengths) != (8, 8):
            return f"its superblock has version {version} and addresses of {size_of_offsets} bytes"
        if start[12:20] != bytes(8) or start[20:28] != UNDEFINED:
            return "its superblock has a base address or an extension"
        found = None
        for kind, data in _messages(file, int.from_bytes(start[36:44], "little")):
            found = found or _tree_in(kind, data)
            if kind == LINK and not data[1] & 8 and not found:
                # A hard link ends with an address.
                linked = _messages(file, int.from_bytes(data[-8:], "little"))
                found = next(filter(None, (_tree_in(*message) for message in linked)), None)
        return found


def _tree_in(kind: int, data: bytes) -> str | None:
    if kind == SYMBOL_TABLE:
        return "a group of it is of the old kind"
    if kind in TREES:
        counter = TREES[kind] * (data[1] & 1)
        if data[2 + counter : 10 + counter] != UNDEFINED:
            return "links or attributes of it are kept in a tree"
    return None


def _messages(file: BinaryIO, address: int) -> Iterator[Message]:
    """Read all messages of an object's header: type and bytes."""
    _seek(file, address)
    if file.read(5) != b"OHDR\x02":
        raise ValueError(f"no object header of version 2 at byte {address}")
    flags = _number(file, 1)
    file.seek((16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0), 1)
    chunks = [(file.tell() + (1 << (flags & 3)), _number(file, 1 << (flags & 3)))]
    for number in range(MAX_CHUNKS):
        if number == len(chunks):
            return
        start, length = chunks[number]
        for kind, data in _messages_in(_read(file, start, length), in_order=bool(flags & 4)):
            if kind == CONTINUATION:
                offset, size = (int.from_bytes(data[n : n + 8], "little") for n in (0, 8))
                # Without its signature and its checksum.
                chunks.append((offset + 4, size - 8))
            yield kind, data
    raise ValueError(f"an object header has more than {MAX_CHUNKS} parts")


def _messages_in(chunk: bytes, in_order: bool) -> Iterator[Message]:
    head = 6 if in_order else 4
    place = 0
    while place + head <= len(chunk):
        size = int.from_bytes(chunk[place + 1 : place + 3], "little")
        yield chunk[place], chunk[place + head : place + head + size]
        place += head + size


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    if not 0 <= length <= MAX_CHUNK_BYTES:
        raise ValueError(f"a part of an object header has {length} bytes")
    _seek(file, start)
    return file.read(length)


def _seek(file: BinaryIO, address: int) -> None:
    if address > os.fstat(file.fileno()).st_size:
        raise ValueError(f"an object header is at byte {address}, beyond the end of the file")
    file.seek(address)


def _number(file: BinaryIO, num_bytes: int) -> int:
    return int.from_bytes(file.read(num_bytes), "little")
