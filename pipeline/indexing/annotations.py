"""Reads the annotation files: COCO captions and LLaVA-Instruct conversations.

Owns the layout of these files; `pipeline.indexing.records` says how a record is read and left out.
Whether records fit together is for `pipeline.indexing.collect`.
"""

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.indexing.records import (
    RecordError,
    Rejection,
    file_name_of,
    id_of,
    lists_of,
    parse_all,
    read_json,
    refuse,
    text_of,
    value_of,
)

IMAGE_MARKER = "<image>"
"""Where LLaVA-Instruct puts the picture: at the start or the end of the first question. In every
prompt here the picture stands before the text, so that the marker is taken out there; anywhere else
it is a word."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles in the order in which they take turns, and what they are called in the index."""


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


def read_captions(path: Path, *, key: str) -> CaptionsFile:
    """Read a file in the layout of COCO's `captions_train2017.json`.

    Args:
        path: The file.
        key: The settings key that named it, for the error text.

    Raises:
        StageError: No such file, not JSON, another layout, or no image in it.
    """
    value = read_json(path, key)
    entries, annotations = lists_of(value, "images", "annotations")
    if entries is None or annotations is None:
        refuse(path, key, "not an object with the lists 'images' and 'annotations'")
    if not entries:
        refuse(path, key, "its list 'images' is empty")
    rejected: list[Rejection] = []
    images = parse_all(entries, _image, "images", f"{path.name}: images", rejected)
    captions = parse_all(annotations, _caption, "captions", f"{path.name}: annotations", rejected)
    return CaptionsFile(images, captions, rejected, len(entries), len(annotations))


def read_conversations(path: Path, *, key: str) -> InstructFile:
    """Read a file in the layout of `llava_instruct_150k.json`.

    Args:
        path: The file.
        key: The settings key that named it, for the error text.

    Raises:
        StageError: No such file, not JSON, or another layout.
    """
    value = read_json(path, key)
    if not isinstance(value, list):
        refuse(path, key, "not a list of conversations")
    rejected: list[Rejection] = []
    kept = parse_all(value, _conversation, "conversations", f"{path.name}: ", rejected)
    return InstructFile(kept, rejected, len(value))


def _image(record: str, entry: dict[str, Any]) -> ImageRecord:
    return ImageRecord(record, id_of(entry, "id"), file_name_of(entry, "file_name"))


def _caption(record: str, entry: dict[str, Any]) -> CaptionRecord:
    caption = " ".join(text_of(entry, "caption").split())
    if not caption:
        raise RecordError("empty caption")
    return CaptionRecord(record, id_of(entry, "id"), id_of(entry, "image_id"), caption)


def _conversation(record: str, entry: dict[str, Any]) -> ConversationRecord:
    image_name = file_name_of(_with_one_image(entry), "image")
    return ConversationRecord(
        record, _conversation_id(entry, image_name), image_name, _turns(entry)
    )


def _with_one_image(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry in which a list of one image is that image."""
    images = entry.get("image")
    if not isinstance(images, list):
        return entry
    if len(images) != 1:
        raise RecordError(f"not about one image: key 'image' is a list of {len(images)}")
    return entry | {"image": images[0]}


def _conversation_id(entry: dict[str, Any], image_name: str) -> str:
    """Return an entry's id as a text; without one, the image's name, as in the official file."""
    found = entry.get("id")
    if found is None:
        return PurePosixPath(image_name).stem
    if isinstance(found, int | float) and not isinstance(found, bool):
        return str(found)
    return text_of(entry, "id")


def _turns(entry: dict[str, Any]) -> list[dict[str, str]]:
    messages = value_of(entry, "conversations", list)
    if not messages or len(messages) % 2:
        raise RecordError(f"not question and answer in turn: {len(messages)} messages")
    roles = zip(messages, cycle(ROLES), strict=False)
    turns = [_turn(message, role) for message, role in roles]
    turns[0]["text"] = _without_marker(turns[0]["text"])
    if not all(turn["text"] for turn in turns):
        raise RecordError("empty message")
    return turns


def _turn(message: object, wanted: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RecordError(f"a message is not an object: {type(message).__name__}")
    role = text_of(message, "from")
    if role != wanted:
        raise RecordError(f"not question and answer in turn: {role[:40]!r} instead of {wanted!r}")
    return {"role": ROLES[role], "text": text_of(message, "value").strip()}


def _without_marker(question: str) -> str:
    """Take out the marker at the start or at the end of a question, one at most.

    One on a line of its own goes first: the other may be a word of the question.
    """
    for start, end in ((f"{IMAGE_MARKER}\n", f"\n{IMAGE_MARKER}"), (IMAGE_MARKER, IMAGE_MARKER)):
        if question.startswith(start):
            return question.removeprefix(start).strip()
        if question.endswith(end):
            return question.removesuffix(end).strip()
    return question
