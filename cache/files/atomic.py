"""Writes files whole or not at all.

A file is written under a temporary name in its folder, synced and renamed; a published file is
never opened for writing again.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import PatchcacheError

CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Add a path to the system errors of a block, such as a full disk, that name no path.

    Python names a file that it cannot open, but not one that it cannot read or write.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def check_ordinary(path: Path, refuse: Callable[[str], PatchcacheError]) -> None:
    """Refuse a pipe, which would be waited for, and a device, which may have no end.

    Args:
        path: Of the file to read. A missing file and a folder pass: opening them fails.
        refuse: Makes the error out of what is wrong.

    Raises:
        PatchcacheError: From `refuse`.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise refuse("a pipe, a socket or a device, wanted an ordinary file")


def check_writable_in_place(path: Path, error: type[PatchcacheError]) -> None:
    """Refuse a link, whose target would be written into, and a pipe, which would be waited for.

    Args:
        path: Of a file that exists or will be created, and is not replaced by rename.
        error: Raised for anything but an ordinary file.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise error(
            f"{path}: a link, or no ordinary file, so it is not written to. Delete it, and run the "
            f"same program again."
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; sync it and rename it to `path` at the end of the block.

    The temporary file is removed if the block raises. A kill can leave one behind, under a name
    that starts with a dot; the next write to the same path replaces it. The code that writes the
    file must raise every error that it meets.

    Raises:
        OSError: Names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    # A link left at this name would be written through.
    temporary.unlink(missing_ok=True)
    try:
        with path_in_errors(path):
            yield temporary
            sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_bytes(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file whole or not at all.

    Args:
        path: Where it appears.
        pieces: Its content, in order.

    Raises:
        OSError: Names `path`.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with path_in_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all; NaN, which JSON does not have, is a ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys, no spaces and a newline at the end; equal values are equal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode() + b"\n"


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link `source` to `target`, or copy it where the file system has no hard links.

    An existing `target` is replaced by rename, never written into. `source` may be a symbolic link:
    its file is linked.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        # A link to a symbolic link would be another symbolic link.
        os.link(source.resolve(), temporary)
    except OSError:
        # Another file system, or one without hard links.
        with replacing(target) as copy:
            shutil.copyfile(source, copy)
        return
    os.replace(temporary, target)
    # Renaming a link onto another link of the same file does nothing (rename(2)).
    temporary.unlink(missing_ok=True)


def sha256_of_pieces(pieces: Iterable[bytes | memoryview]) -> str:
    """Return the sha256 of consecutive pieces of bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes in hexadecimal."""
    with path_in_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
