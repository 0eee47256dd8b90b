"""Reads fields of records, and keeps the reason for each record that is rejected.

Shared by all annotation files. A file that cannot be used is an error; a record that cannot be used
is a `Rejection`.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn, TypeVar

from cache.files.atomic import check_ordinary, path_in_errors
from cache.files.foreign import parse_json
from cache.remote.urls import is_url
from pipeline.images.names import ImageNameError, check_file_name
from pipeline.images.zip_file import REMEDY
from pipeline.indexing.texts.url import copy_of_url
from workspace.errors import StageError
from workspace.paths import RAW

Kind = Literal["images", "captions", "conversations", "objects", "pope"]

COCO_2014 = re.compile("^COCO_(train|val|test)2014_")
"""Prefix of the picture names of COCO 2014, which COCO 2017 dropped."""

_MAX_DIGITS = 18
"""Longest image id in a file name that is sure to fit 64 bits."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A record that is left out of the index."""

    kind: Kind
    record: str
    """Position of the record, such as "captions.json: images[7]"."""
    reason: str
    """The class of the reason, then perhaps ": " and details."""

    @property
    def reason_class(self) -> str:
        """The part of the reason by which rejections are counted."""
        return self.reason.partition(":")[0]


class RecordError(ValueError):
    """Why a record cannot be used."""


Record = TypeVar("Record")


@dataclass(frozen=True)
class AnnotationFile:
    """An input file, and how its errors name it."""

    path: str | Path
    """A path, or an fsspec URL."""
    key: str
    """The settings key that names the file."""
    remedy: str = REMEDY
    """What to do about a file that cannot be used."""

    @property
    def name(self) -> str:
        """The file's name without folders, and without the query of a URL."""
        return str(self.path).partition("?")[0].rpartition("/")[2]

    def refuse(self, reason: str) -> NoReturn:
        """Refuse the whole file.

        Raises:
            StageError: Always.
        """
        raise StageError(f"{self.key}: {self.path}: {reason}. {self.remedy}")

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """Yield the path of an ordinary file on this machine; a copy of a URL's is deleted after.

        Raises:
            StageError: The file does not exist, is a folder, or its server does not deliver it.
        """
        with contextlib.ExitStack() as stack:
            try:
                if is_url(self.path):
                    path = stack.enter_context(copy_of_url(str(self.path), self.key))
                else:
                    path = Path(self.path)
                    path.stat()
            except (FileNotFoundError, NotADirectoryError):
                raise StageError(
                    f"{self.key}: {self.path} does not exist. Name a file of texts; the stage "
                    f"fetch makes what is below {RAW}."
                ) from None
            check_ordinary(
                path, lambda why: StageError(f"{self.key}: {path}: {why}. {self.remedy}")
            )
            if path.is_dir():
                self.refuse("a folder, wanted a file")
            stack.enter_context(path_in_errors(path))
            yield path

    def read_text(self) -> str:
        """Return the text of a UTF-8 file, without a byte order mark.

        Raises:
            StageError: The file does not exist or is not UTF-8.
        """
        with self.local() as path:
            return self.text_of(path)

    def text_of(self, path: Path) -> str:
        """Return the text of this file at the path from `local`; raises as `read_text` does."""
        try:
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self.refuse(f"not usable JSON in UTF-8: {error}")

    def read_json(self) -> Any:
        """Return the value in a JSON file.

        Raises:
            StageError: The file does not exist or is not JSON.
        """
        with self.local() as path:
            return self.json_of(path)

    def json_of(self, path: Path) -> Any:
        """Return the value of this file at the path from `local`; raises as `read_json` does."""
        try:
            return parse_record_json(self.text_of(path))
        except RecordError as error:
            self.refuse(str(error))


def parse_record_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        RecordError: The text is not JSON.
    """
    try:
        return parse_json(text)
    except RecursionError:
        raise RecordError("not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"not usable JSON in UTF-8: {error}") from None


def list_fields(value: Any, *names: str) -> list[list[Any] | None]:
    """Return the lists under some keys of a JSON value, None for each that is missing."""
    fields = value if isinstance(value, dict) else {}
    return [fields[name] if isinstance(fields.get(name), list) else None for name in names]


Entry = tuple[str, object]
"""The position of a record, such as "captions.csv: line 7", and its value: a `RecordError` if not
even that could be read."""


def positions(entries: Iterable[object], where: str) -> Iterator[Entry]:
    """Yield the entries of a list with their positions in the list at `where`."""
    return ((f"{where}[{position}]", entry) for position, entry in enumerate(entries))


def parse_all(
    entries: Iterable[Entry],
    parse: Callable[[str, dict[str, Any]], Record],
    kind: Kind,
    rejected: list[Rejection],
) -> list[Record]:
    """Parse entries; unusable ones are added to `rejected`.

    Args:
        entries: The entries and their positions.
        parse: Makes a record of its position and its entry, or raises a `RecordError`.
        kind: Kind of the rejections.
        rejected: Grows.
    """
    records = []
    for record, entry in entries:
        try:
            records.append(parse(record, require_object(entry)))
        except RecordError as error:
            rejected.append(Rejection(kind, record, str(error)))
    return records


def require_object(entry: object) -> dict[str, Any]:
    """Return an entry that is a JSON object.

    Raises:
        RecordError: The entry is something else.
    """
    if isinstance(entry, RecordError):
        raise entry
    if not isinstance(entry, dict):
        raise RecordError(f"not an object: {type(entry).__name__}")
    return entry


def field_of_type(entry: dict[str, Any], name: str, wanted: type) -> Any:
    """Return a field of exactly this type.

    Raises:
        RecordError: The field is missing or of another type.
    """
    if name not in entry:
        raise RecordError(f"no key {name!r}")
    # Not isinstance, for which True is an integer.
    if type(entry[name]) is not wanted:
        found = type(entry[name]).__name__
        raise RecordError(f"key {name!r} is not {wanted.__name__}: {found}")
    return entry[name]


def int64_field(entry: dict[str, Any], name: str) -> int:
    """Return a field that is an integer of 64 bits; raises as `field_of_type` does."""
    number: int = field_of_type(entry, name, int)
    if not -(2**63) <= number < 2**63:
        raise RecordError(f"key {name!r} does not fit 64 bits")
    return number


def str_field(entry: dict[str, Any], name: str) -> str:
    """Return a field that is a text which UTF-8 can encode; raises as `field_of_type` does."""
    text: str = field_of_type(entry, name, str)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"key {name!r} holds half a character (a lone surrogate)") from None
    return text


def caption_text(text: str) -> str:
    """Return a caption with white space reduced to single spaces.

    Raises:
        RecordError: Nothing is left.
    """
    caption = " ".join(text.split())
    if not caption:
        raise RecordError("empty caption")
    return caption


def file_name_field(entry: dict[str, Any], name: str) -> str:
    """Return a field that is a file name below the image root; raises as `field_of_type` does."""
    file_name = str_field(entry, name)
    try:
        check_file_name(file_name)
    except ImageNameError as error:
        raise RecordError(f"bad file name: {error}") from None
    return file_name


def image_id_in(file_name: str) -> int:
    """Return the image id in a name like COCO's: the number at its end.

    Raises:
        RecordError: The name does not end in a number.
    """
    number = re.search("[0-9]+$", PurePosixPath(file_name).stem)
    if number is None or len(number[0]) > _MAX_DIGITS:
        raise RecordError(f"image without an id: no number at the end of {file_name!r}")
    return int(number[0])
