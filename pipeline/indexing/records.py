"""The form of a single record: how fields are read from JSON, and how a bad one is left out.

Owns what is common to all annotation files. A file that cannot be used is an error; a record that
cannot be used is a `Rejection`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn, TypeVar

from cache.files.atomic import check_ordinary, path_in_errors
from cache.files.foreign import parse_json
from pipeline.images.names import ImageNameError, check_file_name
from workspace.errors import StageError

Kind = Literal["images", "captions", "conversations", "objects", "pope"]

NAME_ANOTHER = (
    "Replace it, or name another file there; the sources demo and coco make it in the fetch stage."
)

_MOST_DIGITS = 18
"""Of an image id in a file name: more need not fit 64 bits."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A record that is left out. `reason` is its class, then perhaps ": " and the details."""

    kind: Kind
    record: str
    reason: str

    @property
    def reason_class(self) -> str:
        """What is counted together."""
        return self.reason.partition(":")[0]


class RecordError(ValueError):
    """Why a record cannot be used."""


Record = TypeVar("Record")


def read_json(path: Path, key: str, remedy: str = NAME_ANOTHER) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        key: The settings key that named it, for the error text.
        remedy: What to do about a file that cannot be used, for the error text.

    Raises:
        StageError: No such file, or not JSON.
    """
    try:
        return json_value(read_text(path, key, remedy))
    except RecordError as error:
        refuse(path, key, str(error), remedy)


def read_text(path: Path, key: str, remedy: str = NAME_ANOTHER) -> str:
    """Read a UTF-8 file, with or without a byte order mark; arguments as in `read_json`.

    Raises:
        StageError: No such file, or not UTF-8.
    """
    check_ordinary(path, lambda why: StageError(f"{key}: {path}: {why}. {remedy}"))
    try:
        with path_in_errors(path):
            return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise StageError(
            f"{key}: {path} does not exist. Name an annotation file there; the sources demo and "
            f"coco make it in the fetch stage."
        ) from None
    except IsADirectoryError:
        refuse(path, key, "a folder, wanted a JSON file", remedy)
    except UnicodeDecodeError as error:
        refuse(path, key, f"not usable JSON in UTF-8: {error}", remedy)


def json_value(text: str) -> Any:
    """Return the value that a JSON text stands for.

    Raises:
        RecordError: It stands for none.
    """
    try:
        return parse_json(text)
    except RecursionError:
        raise RecordError("not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"not usable JSON in UTF-8: {error}") from None


def refuse(path: Path, key: str, reason: str, remedy: str = NAME_ANOTHER) -> NoReturn:
    """Say that a whole file cannot be used.

    Raises:
        StageError: Always.
    """
    raise StageError(f"{key}: {path}: {reason}. {remedy}")


def lists_of(value: Any, *names: str) -> list[list[Any] | None]:
    """Return the lists under some keys of a JSON value, None for each that is not there."""
    found = value if isinstance(value, dict) else {}
    return [found[name] if isinstance(found.get(name), list) else None for name in names]


def parse_all(
    entries: list[Any],
    parse: Callable[[str, dict[str, Any]], Record],
    kind: Kind,
    place: str,
    rejected: list[Rejection],
) -> list[Record]:
    """Parse the entries of a list; those that cannot be used go to `rejected`.

    Args:
        entries: What the file holds.
        parse: Makes a record of its place and its entry, or raises a `RecordError`.
        kind: Of the rejections.
        place: Where the list stands: a record's place is this and its position.
        rejected: Grows.
    """
    kept = []
    for position, entry in enumerate(entries):
        record = f"{place}[{position}]"
        try:
            kept.append(parse(record, as_object(entry)))
        except RecordError as error:
            rejected.append(Rejection(kind, record, str(error)))
    return kept


def as_object(entry: Any) -> dict[str, Any]:
    """Return an entry that is a JSON object.

    Raises:
        RecordError: It is something else.
    """
    if not isinstance(entry, dict):
        raise RecordError(f"not an object: {type(entry).__name__}")
    return entry


def value_of(entry: dict[str, Any], name: str, wanted: type) -> Any:
    """Return a field of exactly this type.

    Raises:
        RecordError: Not there, or of another type.
    """
    if name not in entry:
        raise RecordError(f"no key {name!r}")
    # Not isinstance: True is no id.
    if type(entry[name]) is not wanted:
        found = type(entry[name]).__name__
        raise RecordError(f"key {name!r} is not {wanted.__name__}: {found}")
    return entry[name]


def id_of(entry: dict[str, Any], name: str) -> int:
    """Return a field that is an integer of 64 bits.

    Raises:
        RecordError: Not there, or something else.
    """
    number: int = value_of(entry, name, int)
    if not -(2**63) <= number < 2**63:
        raise RecordError(f"key {name!r} does not fit 64 bits")
    return number


def text_of(entry: dict[str, Any], name: str) -> str:
    """Return a field that is a text which UTF-8 can hold.

    Raises:
        RecordError: Not there, or something else.
    """
    text: str = value_of(entry, name, str)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"key {name!r} holds half a character (a lone surrogate)") from None
    return text


def file_name_of(entry: dict[str, Any], name: str) -> str:
    """Return a field that is a file name below the image root.

    Raises:
        RecordError: Not there, empty, or it leaves the image root.
    """
    file_name = text_of(entry, name)
    try:
        check_file_name(file_name)
    except ImageNameError as error:
        raise RecordError(f"bad file name: {error}") from None
    return file_name


def image_id_in(file_name: str) -> int:
    """Return the image id in a name of COCO's: the number at its end.

    Raises:
        RecordError: There is none.
    """
    number = re.search("[0-9]+$", PurePosixPath(file_name).stem)
    if number is None or len(number[0]) > _MOST_DIGITS:
        raise RecordError(f"image without an id: no number at the end of {file_name!r}")
    return int(number[0])
