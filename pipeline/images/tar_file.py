"""The image files in a tar shard, read in place by their offsets.

A tar has no directory, so all its headers are read when it is opened. `tarfile` takes three times
as long for that, and reads a long name of any size into memory.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from pipeline.images.byte_file import ByteFile
from pipeline.images.names import (
    OTHER_SUFFIXES,
    ImageNameError,
    by_base_name,
    check_size,
    is_visible,
    plain_name,
    read_repeated,
    reading_image,
    suffix_of,
)
from pipeline.images.zip_file import REMEDY
from workspace.errors import StageError

BLOCK = 512
"""Bytes of a header; content is padded to whole blocks."""

SCAN_BUFFER_BYTES = 1 << 20
"""Bytes of a read of a remote shard's headers: most images between two headers are smaller."""

MAX_NAME_BYTES = 1 << 20
"""Limit of a long name or of the extended fields of a member, which are read into memory."""

MAX_ZERO_BLOCKS = 1 << 16
"""Most empty blocks in a row: writers end a tar with 2 to 2048."""

END_BLOCKS = 2
"""Empty blocks that end a tar."""

REGULAR, FOLDER, SPARSE = (b"\0", b"0", b"7"), b"5", b"S"
"""Types of ordinary files, of folders, and of files with holes."""

WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", FOLDER, b"6")
"""Types of links, devices, folders and pipes, whose size says nothing."""

LONG_NAME, LONG_LINK, EXTENDED, GLOBAL = b"L", b"K", b"x", b"g"
"""Types of headers that describe the next member, or all later ones."""

SPARSE_FIELD = "GNU.sparse"
"""Stands for all extended fields that describe the holes of a file."""

MAX_DIGITS = len(str(BLOCK << 32))
"""Length from which on the size of an extended field is no number."""

NULLS = bytes(BLOCK)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file in a tar."""

    name: str
    """The path, as unpacking would write it."""
    start: int
    """Offset of the content."""
    num_bytes: int
    is_ordinary: bool
    """Whether the member is a file with content: no link, device or pipe."""


class TarError(ValueError):
    """Bytes that are no tar."""


def scan_tar(stream: BinaryIO, num_bytes: int) -> Iterator[TarMember]:
    """Yield the members of a tar, folders left out; the caller may move the stream meanwhile.

    Args:
        stream: The tar.
        num_bytes: Its size.

    Raises:
        TarError: The bytes are no tar, or the tar is cut short.
    """
    start = zero_blocks = 0
    fields: dict[str, str] = {}
    lasting: dict[str, str] = {}
    while start + BLOCK <= num_bytes:
        header = _read(stream, start, BLOCK)
        start += BLOCK
        if header == NULLS:
            zero_blocks += 1
            if zero_blocks > MAX_ZERO_BLOCKS:
                raise TarError(f"{MAX_ZERO_BLOCKS} empty blocks follow offset {start}")
            continue
        zero_blocks = 0
        name, size, kind = _parse(header, start - BLOCK)
        if kind in (LONG_NAME, LONG_LINK, EXTENDED, GLOBAL):
            content = _read_fields(stream, start, size, num_bytes)
            if kind == LONG_NAME:
                fields["path"] = _text(content.partition(b"\0")[0])
            elif kind != LONG_LINK:
                (lasting if kind == GLOBAL else fields).update(_extended(content))
        else:
            known = lasting | fields if lasting else fields
            path = known.get("path", name)
            name = plain_name(path)
            if "size" in known:
                size = _decimal(known["size"])
            if kind == SPARSE or SPARSE_FIELD in known:
                raise TarError(f"{name!r} is stored with holes; write it without --sparse")
            size = 0 if kind in WITHOUT_CONTENT else size
            if start + size > num_bytes:
                raise TarError(f"cut short in the member {name!r}")
            if name and kind != FOLDER and not path.endswith("/"):
                yield TarMember(name, start, size, kind in REGULAR)
            fields = {}
        start += -(-size // BLOCK) * BLOCK
    if zero_blocks < END_BLOCKS:
        raise TarError("cut short: the two empty blocks at its end are missing")


def _parse(header: bytes, start: int) -> tuple[str, int, bytes]:
    """Return name, size and type in a header."""
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    try:
        given, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        given = -1
    if checksum != given:
        raise TarError(f"no header of a member at offset {start}")
    name = header[:100].partition(b"\0")[0]
    # GNU's format, whose magic ends in spaces, has other fields here.
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name), size, header[156:157]


def _number(field: bytes) -> int:
    """Return a number in octal digits or, if they do not suffice, in base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ") or b"0"
    # `int` takes a sign too, and a negative size would lead back to the same member for ever.
    if not digits.isdigit():
        raise ValueError(f"not a number: {digits!r}")
    return int(digits, 8)


def _decimal(text: str) -> int:
    if not text.isdecimal() or len(text) > len(str(2**64)):
        raise TarError(f"a size of {text[:40]!r} bytes")
    return int(text)


def _text(name: bytes) -> str:
    # A name in another encoding gets an escape for each of its bytes: such a name stays printable.
    return name.decode("utf-8", "backslashreplace")


def _read_fields(stream: BinaryIO, start: int, size: int, num_bytes: int) -> bytes:
    if size > MAX_NAME_BYTES:
        raise TarError(f"a name or field of {size} bytes, wanted at most {MAX_NAME_BYTES}")
    if start + size > num_bytes:
        raise TarError("cut short in a name")
    return _read(stream, start, size)


def _read(stream: BinaryIO, start: int, num_bytes: int) -> bytes:
    stream.seek(start)
    data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise TarError(f"cut short at offset {start}")
    return data


def _extended(content: bytes) -> dict[str, str]:
    """Return the fields of an extended header, `<length> <name>=<value>` and a newline each.

    Fields that mean nothing here are left out: a header can have a hundred thousand.
    """
    fields, start = {}, 0
    content = content.rstrip(b"\0")
    while start < len(content):
        digits = content[start : start + MAX_DIGITS].partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < MAX_DIGITS else 0
        end = start + length
        if not len(digits) + 1 < length <= len(content) - start:
            raise TarError("an extended header of no known form")
        name, _, value = content[start + len(digits) + 1 : end - 1].partition(b"=")
        if name.startswith(b"GNU.sparse."):
            fields[SPARSE_FIELD] = ""
        elif name in (b"path", b"size"):
            fields[_text(name)] = _text(value)
        start = end
    return fields


@contextlib.contextmanager
def reading_tar(file: ByteFile, key: str) -> Iterator[tuple[BinaryIO, Iterator[TarMember]]]:
    """Open a tar, and yield its stream and its members, as `scan_tar` finds them.

    Raises:
        StageError: The tar cannot be read; names the settings key.
    """

    def refuse(reason: str) -> StageError:
        return StageError(f"{key}: {file.address} is no readable tar ({reason}). {REMEDY}")

    with (
        reading_image(refuse, f"{key}: {file.address}"),
        contextlib.closing(file.open(SCAN_BUFFER_BYTES)) as stream,
    ):
        yield stream, scan_tar(stream, file.size())


class ImageTar:
    """The image files in a tar shard; the table of members is kept where the shard is pickled."""

    def __init__(self, file: ByteFile, *, key: str) -> None:
        """Read the headers; errors name the settings key.

        Raises:
            StageError: The tar cannot be read, or is empty.
        """
        self._file = file
        self.path = file.address
        self._real_path = file.real_path
        self._members: dict[str, list[TarMember]] = {}
        with reading_tar(file, key) as (_, members):
            for member in members:
                if suffix_of(member.name) not in OTHER_SUFFIXES:
                    self._members.setdefault(member.name, []).append(member)
        if not self._members:
            raise StageError(f"{key}: {self.path} is a tar without images, wanted images in it.")
        self._names: dict[str, list[str]] | None = None

    def has(self, name: str) -> bool:
        """Whether a member has this path."""
        return name in self._members

    def names(self, base_name: str) -> Sequence[str]:
        """Return the paths of all members with this base name, sorted."""
        if self._names is None:
            self._names = by_base_name(self._members)
        return self._names.get(base_name, ())

    def all_names(self) -> list[str]:
        """Return the paths of all members, but for hidden ones, sorted."""
        return sorted(filter(is_visible, self._members))

    def real_path(self, name: str) -> str:
        """Return the tar's path with all links resolved, followed by the member's."""
        return f"{self._real_path}/{name}"

    def read(self, name: str) -> bytes:
        """Return the bytes of a member.

        Raises:
            ImageNameError: The member is a link or too large, or two of this name differ.
            StageError: The disk, the network or the machine failed.
        """
        return read_repeated(self._members[name], self._read, name, self.path)

    def _read(self, member: TarMember) -> bytes:
        where = f"{member.name!r} in {self.path}"
        check_size(member.name, member.num_bytes)
        if not member.is_ordinary:
            raise ImageNameError(
                f"{where} is a link or another special file, and these are not followed in a tar"
            )
        with reading_image(lambda reason: ImageNameError(f"{where}: {reason}"), where):
            data = self._file.read_at(member.start, member.num_bytes)
        if len(data) != member.num_bytes:
            raise ImageNameError(f"{where}: the tar has become shorter")
        return data

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_names": None}
