"""Names of image files: which are allowed, and the errors of the files that they name.

A file's full name is its path below the image folder or in the zip, with `/` between folders. In a
tar shard or a table, which numbers its files anew, the name of the shard stands before it.
"""

import contextlib
import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from cache.errors import PatchcacheError
from cache.files.foreign import reading_foreign_file
from workspace.errors import StageError

Member = TypeVar("Member")

MAX_IMAGE_BYTES = 256 * 2**20
"""Limit of an image file, checked before it is read: a zip member can claim any size."""

IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm"}
    | {"jp2", "j2k", "jpx"}
)
"""Suffixes of files that `pipeline.images.decode` reads, without the dot."""

OTHER_SUFFIXES = frozenset(
    {"txt", "json", "jsonl", "ndjson", "csv", "tsv", "md", "html", "htm", "xml", "yaml", "yml"}
    | {"cls", "cls2", "npy", "npz", "pt", "pth", "pkl", "pickle", "pyd", "parquet"}
)
"""Suffixes of files in a shard that are no images: texts, labels, arrays."""

SYSTEM_NAMES = frozenset(
    {"__MACOSX", "lost+found", "System Volume Information", "$RECYCLE.BIN"}
    | {"Thumbs.db", "desktop.ini"}
)
"""Files and folders that systems leave among images."""

_FILE_ERRNOS = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EACCES,
    # A damaged zip can place a member before the start of the file.
    errno.EINVAL,
}
"""System errors that concern one file; all others concern the disk or the machine."""


class ImageNameError(PatchcacheError, ValueError):
    """A file name that leaves the image root, or names nothing there that can be read."""


def plain_name(path: str) -> str:
    """Return a relative path as `unzip` would write it: without empty, `.` and `..` parts."""
    parts = path.split("/")
    return "/".join([part for part in parts if part not in ("", ".", "..")])


def check_file_name(file_name: str) -> None:
    """Refuse a name that is not a plain relative path below the image root.

    Raises:
        ImageNameError: The name is empty, absolute, or holds `..`, a backslash or a zero byte.
    """
    if not file_name:
        raise ImageNameError("file name is empty")
    # Without pathlib, which would take most of the time to open COCO's zip of 118,287 names.
    if file_name.startswith("/") or ".." in file_name.split("/"):
        raise ImageNameError(f"file name {file_name!r} leaves the image root")
    if "\\" in file_name or "\0" in file_name:
        raise ImageNameError(
            f"file name {file_name!r} holds a backslash or a zero byte, wanted / between folders"
        )


def is_visible(name: str) -> bool:
    """Whether no part of a path is hidden, or left by a system."""
    return not (name.startswith(".") or "/." in name) and SYSTEM_NAMES.isdisjoint(name.split("/"))


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name, in lower case and without the dot, or an empty text."""
    base_name = name.rpartition("/")[2]
    return base_name.rpartition(".")[2].lower() if "." in base_name else ""


def is_named_as_image(name: str) -> bool:
    """Whether a file's name has the suffix of an image, or none, as in a table."""
    return suffix_of(name) in IMAGE_SUFFIXES | {""}


def by_base_name(names: Iterable[str]) -> dict[str, list[str]]:
    """Return full names by their base names, each list sorted."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        found[name.rpartition("/")[2]].append(name)
    return dict(found)


def read_repeated(
    members: Sequence[Member], read: Callable[[Member], bytes], name: str, path: str
) -> bytes:
    """Return the bytes of a file that an archive may hold several times.

    Args:
        members: The entries of the file, at least one.
        read: Reads an entry.
        name: Of the file, for the error text.
        path: Of the archive, for the error text.

    Raises:
        ImageNameError: Two entries differ.
    """
    first, *others = members
    data = read(first)
    if any(read(other) != data for other in others):
        raise ImageNameError(f"{name!r} stands twice in {path}, with other bytes")
    return data


def check_size(name: str, num_bytes: int) -> None:
    """Refuse a file of more than `MAX_IMAGE_BYTES` with an ImageNameError."""
    if num_bytes > MAX_IMAGE_BYTES:
        raise ImageNameError(f"{name!r} has more than {MAX_IMAGE_BYTES} bytes")


@contextlib.contextmanager
def reading_image(refuse: Callable[[str], PatchcacheError], where: str) -> Iterator[None]:
    """Raise what `refuse` makes of the reason if a file cannot be read.

    Raises:
        StageError: The disk or the machine failed; names `where`.
    """
    try:
        with reading_foreign_file(refuse):
            yield
    except OSError as error:
        if error.errno in _FILE_ERRNOS:
            raise refuse(str(error.strerror)) from None
        raise StageError(
            f"{where} cannot be read: {error.strerror}. Nothing is known about the file; mend "
            f"what the system complains of, and run again."
        ) from None
