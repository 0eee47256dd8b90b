"""Parses LLaVA's records: a conversation about an image, or one question as a caption's request.

A table with a question and an answer in each row gives the same records.
"""

from itertools import cycle
from pathlib import PurePosixPath
from typing import Any

from pipeline.indexing.annotations import ConversationRecord
from pipeline.indexing.records import (
    RecordError,
    caption_text,
    field_of_type,
    file_name_field,
    str_field,
)
from pipeline.indexing.rejections import TEXT_ONLY
from pipeline.indexing.texts.columns import ANSWER, CONVERSATIONS, ID, IMAGE, QUESTION, name_in

IMAGE_MARKER = "<image>"
"""Marks the picture at the start or the end of the first question of LLaVA-Instruct. It is removed
there, because every prompt here puts the picture before the text; elsewhere it is a plain word."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of LLaVA-Instruct, in the order of their turns, and their names in the index."""


def parse_conversation(record: str, entry: dict[str, Any]) -> ConversationRecord:
    """Parse a record of `llava_instruct_150k.json`, or of LLaVA-1.5's mixture.

    Raises:
        RecordError: The record cannot be used.
    """
    name = image_name(entry)
    turns = _turns(entry)
    if not all(turn["text"] for turn in turns):
        raise RecordError("empty message")
    return ConversationRecord(record, conversation_id(entry, name), name, turns)


def image_name(entry: dict[str, Any]) -> str:
    """Return the name of a record's one image.

    Raises:
        RecordError: The record has no usable name, several, or is about no image.
    """
    images = entry.get("image")
    if images is None and not _mentions_image(field_of_type(entry, CONVERSATIONS, list)):
        raise RecordError(TEXT_ONLY)
    if isinstance(images, list):
        if len(images) != 1:
            raise RecordError(f"not about one image: key 'image' is a list of {len(images)}")
        entry = entry | {"image": images[0]}
    return file_name_field(entry, "image")


def _mentions_image(messages: list[Any]) -> bool:
    texts = (message.get("value") for message in messages if isinstance(message, dict))
    return any(isinstance(text, str) and IMAGE_MARKER in text for text in texts)


def answer_as_caption(entry: dict[str, Any]) -> str:
    """Return the answer of a record with one question, as in LLaVA-Pretrain.

    Raises:
        RecordError: The record cannot be used, or asks more.
    """
    turns = _turns(entry)
    if len(turns) > len(ROLES):
        raise RecordError(f"more than one question: {len(turns) // 2}")
    return caption_text(turns[1]["text"])


def conversation_of_row(record: str, entry: dict[str, Any]) -> ConversationRecord:
    """Parse a row of a table with an image, a question and its answer.

    Raises:
        RecordError: The row cannot be used.
    """
    image = name_in(entry, IMAGE)
    if entry.get(image) is None:
        raise RecordError(TEXT_ONLY)
    name = file_name_field(entry, image)
    question = without_marker(str_field(entry, *QUESTION).strip())
    answer = str_field(entry, *ANSWER).strip()
    if not (question and answer):
        raise RecordError("empty message")
    turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    return ConversationRecord(record, conversation_id(entry, name), name, turns)


def conversation_id(entry: dict[str, Any], name: str) -> str:
    """Return an entry's id as a text; if it has none, the image's name, as in the official file."""
    found = entry.get(ID)
    if found is None:
        return PurePosixPath(name).stem
    if isinstance(found, int | float) and not isinstance(found, bool):
        return str(found)
    return str_field(entry, ID)


def _turns(entry: dict[str, Any]) -> list[dict[str, str]]:
    messages = field_of_type(entry, CONVERSATIONS, list)
    if not messages or len(messages) % 2:
        raise RecordError(f"not question and answer in turn: {len(messages)} messages")
    roles = zip(messages, cycle(ROLES), strict=False)
    turns = [_turn(message, role) for message, role in roles]
    turns[0]["text"] = without_marker(turns[0]["text"])
    return turns


def _turn(message: object, wanted: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RecordError(f"a message is not an object: {type(message).__name__}")
    role = str_field(message, "from")
    if role != wanted:
        raise RecordError(f"not question and answer in turn: {role[:40]!r} instead of {wanted!r}")
    return {"role": ROLES[role], "text": str_field(message, "value").strip()}


def without_marker(question: str) -> str:
    """Remove one marker at the start or the end of a question.

    A marker on a line of its own comes first, since another may be a word of the question.
    """
    for start, end in ((f"{IMAGE_MARKER}\n", f"\n{IMAGE_MARKER}"), (IMAGE_MARKER, IMAGE_MARKER)):
        if question.startswith(start):
            return question.removeprefix(start).strip()
        if question.endswith(end):
            return question.removesuffix(end).strip()
    return question
