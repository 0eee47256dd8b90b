"""Reads the annotation files: COCO captions and LLaVA-Instruct conversations.

Owns the layout of a file and the form of a single record. A file that cannot be used is an error;
a record that cannot be used is a `Rejection`. Whether records fit together is for
`pipeline.collect`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from cache.errors import StageError
from cache.images import ImageNameError, check_file_name

Kind = Literal["images", "captions", "conversations"]

IMAGE_MARKER = "<image>"
"""Where LLaVA-Instruct puts the picture. It stands before the text in every prompt here."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles in the order in which they take turns, and what they are called in the index."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """A record that is left out. `reason` is its class, then perhaps ": " and the details."""

    kind: Kind
    record: str
    reason: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An entry of `images`; `record` says where it stands."""

    record: str
    image_id: int
    file_name: str


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """An entry of `annotations`, its white space normalised."""

    record: str
    caption_id: int
    image_id: int
    caption: str


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """An entry of the instruct file; `turns` are role and text, from user to assistant in turn."""

    record: str
    conversation_id: str
    image_name: str
    turns: list[dict[str, str]]


@dataclass(frozen=True)
class CaptionsFile:
    """A captions file: what can be used, what cannot, and how many entries there are."""

    images: list[ImageRecord]
    captions: list[CaptionRecord]
    rejected: list[Rejection]
    num_images: int
    num_captions: int


@dataclass(frozen=True)
class InstructFile:
    """An instruct file: what can be used, what cannot, and how many entries there are."""

    conversations: list[ConversationRecord]
    rejected: list[Rejection]
    num_conversations: int


class RecordError(ValueError):
    """Why a record cannot be used."""


Record = TypeVar("Record")


def read_captions(path: Path, *, key: str) -> CaptionsFile:
    """Read a file in the layout of COCO's `captions_train2017.json`.

    Args:
        path: The file.
        key: The settings key that named it, for the error text.

    Raises:
        StageError: No such file, not JSON, another layout, or no image in it.
    """
    value = _read_json(path, key)
    entries, annotations = _lists(value, "images", "annotations")
    if entries is None or annotations is None:
        _refuse(path, key, "not an object with the lists 'images' and 'annotations'")
    if not entries:
        _refuse(path, key, "its list 'images' is empty")
    rejected: list[Rejection] = []
    images = _parse_all(entries, _image, "images", f"{path.name}: images", rejected)
    captions = _parse_all(annotations, _caption, "captions", f"{path.name}: annotations", rejected)
    return CaptionsFile(images, captions, rejected, len(entries), len(annotations))


def _lists(value: Any, *names: str) -> list[list[Any] | None]:
    found = value if isinstance(value, dict) else {}
    return [found[name] if isinstance(found.get(name), list) else None for name in names]


def read_conversations(path: Path, *, key: str) -> InstructFile:
    """Read a file in the layout of `llava_instruct_150k.json`.

    Args:
        path: The file.
        key: The settings key that named it, for the error text.

    Raises:
        StageError: No such file, not JSON, or another layout.
    """
    value = _read_json(path, key)
    if not isinstance(value, list):
        _refuse(path, key, "not a list of conversations")
    rejected: list[Rejection] = []
    kept = _parse_all(value, _conversation, "conversations", f"{path.name}: ", rejected)
    return InstructFile(kept, rejected, len(value))


def _read_json(path: Path, key: str) -> Any:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return json.loads(text, parse_constant=_no_constant)
    except FileNotFoundError:
        raise StageError(
            f"{key}: {path} does not exist. Run the fetch stage, or name an annotation file there."
        ) from None
    except IsADirectoryError:
        _refuse(path, key, "a folder, wanted a JSON file")
    except RecursionError:
        _refuse(path, key, "not usable JSON: nested too deeply")
    except ValueError as error:
        _refuse(path, key, f"not usable JSON in UTF-8: {error}")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _refuse(path: Path, key: str, reason: str) -> NoReturn:
    raise StageError(f"{key}: {path}: {reason}. Fetch it again, or name another file there.")


def _parse_all(
    entries: list[Any],
    parse: Callable[[str, dict[str, Any]], Record],
    kind: Kind,
    place: str,
    rejected: list[Rejection],
) -> list[Record]:
    kept = []
    for position, entry in enumerate(entries):
        record = f"{place}[{position}]"
        try:
            if not isinstance(entry, dict):
                raise RecordError(f"not an object: {type(entry).__name__}")
            kept.append(parse(record, entry))
        except RecordError as error:
            rejected.append(Rejection(kind, record, str(error)))
    return kept


def _image(record: str, entry: dict[str, Any]) -> ImageRecord:
    return ImageRecord(record, _id(entry, "id"), _file_name(entry, "file_name"))


def _caption(record: str, entry: dict[str, Any]) -> CaptionRecord:
    caption = " ".join(_text(entry, "caption").split())
    if not caption:
        raise RecordError("empty caption")
    return CaptionRecord(record, _id(entry, "id"), _id(entry, "image_id"), caption)


def _conversation(record: str, entry: dict[str, Any]) -> ConversationRecord:
    return ConversationRecord(record, _text(entry, "id"), _file_name(entry, "image"), _turns(entry))


def _turns(entry: dict[str, Any]) -> list[dict[str, str]]:
    messages = _value(entry, "conversations", list)
    if not messages or len(messages) % 2:
        raise RecordError(f"not question and answer in turn: {len(messages)} messages")
    return [_turn(message, role) for message, role in zip(messages, cycle(ROLES), strict=False)]


def _turn(message: object, wanted: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RecordError(f"a message is not an object: {type(message).__name__}")
    role = _text(message, "from")
    if role != wanted:
        raise RecordError(f"not question and answer in turn: {role[:40]!r} instead of {wanted!r}")
    text = _text(message, "value")
    # Taking one marker out can join the halves of another.
    while IMAGE_MARKER in text:
        text = text.replace(IMAGE_MARKER, "")
    if not text.strip():
        raise RecordError("empty message")
    return {"role": ROLES[role], "text": text.strip()}


def _value(entry: dict[str, Any], name: str, wanted: type) -> Any:
    if name not in entry:
        raise RecordError(f"no key {name!r}")
    # Not isinstance: True is no id.
    if type(entry[name]) is not wanted:
        found = type(entry[name]).__name__
        raise RecordError(f"key {name!r} is not {wanted.__name__}: {found}")
    return entry[name]


def _id(entry: dict[str, Any], name: str) -> int:
    number: int = _value(entry, name, int)
    if not -(2**63) <= number < 2**63:
        raise RecordError(f"key {name!r} does not fit 64 bits")
    return number


def _text(entry: dict[str, Any], name: str) -> str:
    text: str = _value(entry, name, str)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RecordError(f"key {name!r} holds half a character (a lone surrogate)") from None
    return text


def _file_name(entry: dict[str, Any], name: str) -> str:
    file_name = _text(entry, name)
    try:
        check_file_name(file_name)
    except ImageNameError as error:
        raise RecordError(f"bad file name: {error}") from None
    return file_name
