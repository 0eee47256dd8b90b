"""Reads the annotation files: COCO captions and LLaVA-Instruct conversations.

Knows the layout of these files. Whether their records fit together is decided in
`pipeline.indexing.collect`.
"""

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.indexing.records import (
    AnnotationFile,
    RecordError,
    Rejection,
    field_of_type,
    file_name_field,
    int64_field,
    list_fields,
    parse_all,
    str_field,
)
from workspace.data_settings import Split

IMAGE_MARKER = "<image>"
"""Marks the picture at the start or the end of the first question of LLaVA-Instruct. It is removed
there, because every prompt here puts the picture before the text; elsewhere it is a plain word."""

ROLES = {"human": "user", "gpt": "assistant"}
"""Roles of LLaVA-Instruct, in the order of their turns, and their names in the index."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An entry of `images`."""

    record: str
    """Position of the entry, such as "captions.json: images[7]"."""
    image_id: int | None
    """None where the file numbers no images: the id then follows from the file's full name."""
    file_name: str
    other_names: tuple[str, ...] = ()
    """Names in other releases of the pictures, tried in order where no file has the first."""
    split: Split | None = None
    """The split that the file gives; None: the one that the file itself is of."""


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """An entry of `annotations`, with white space reduced to single spaces."""

    record: str
    caption_id: int
    image: int | str
    """The id of its image in the same file, or the name if the file numbers no images."""
    caption: str


@dataclass(frozen=True, slots=True)
class ConversationRecord:
    """An entry of the instruct file."""

    record: str
    conversation_id: str
    image_name: str
    turns: list[dict[str, str]]
    """Role and text of each turn, user and assistant alternating."""


@dataclass(frozen=True)
class CaptionsFile:
    """The records of a captions file, its rejected entries, and the numbers of all entries."""

    images: list[ImageRecord]
    captions: list[CaptionRecord]
    rejected: list[Rejection]
    num_images: int
    num_captions: int

    @property
    def numbers_images(self) -> bool:
        """Whether the file gives the ids of its images."""
        return all(image.image_id is not None for image in self.images)


@dataclass(frozen=True)
class InstructFile:
    """The conversations of an instruct file, its rejected entries, and the numbers of entries."""

    conversations: list[ConversationRecord]
    rejected: list[Rejection]
    num_conversations: int
    num_objects: int = 0
    """Entries of the instances file from which the conversations were made, if none else counts
    them."""


def read_captions(path: Path, *, key: str) -> CaptionsFile:
    """Read a file in the layout of COCO's `captions_train2017.json`; errors name the settings key.

    Raises:
        StageError: The file does not exist, is not JSON, has another layout, or lists no image.
    """
    file = AnnotationFile(path, key)
    entries, annotations = list_fields(file.read_json(), "images", "annotations")
    if entries is None or annotations is None:
        file.refuse("not an object with the lists 'images' and 'annotations'")
    if not entries:
        file.refuse("its list 'images' is empty")
    rejected: list[Rejection] = []
    images = parse_all(entries, _image, "images", f"{path.name}: images", rejected)
    captions = parse_all(annotations, _caption, "captions", f"{path.name}: annotations", rejected)
    return CaptionsFile(images, captions, rejected, len(entries), len(annotations))


def parse_conversations(file: AnnotationFile, entries: list[Any]) -> InstructFile:
    """Parse the list in a file of the layout of `llava_instruct_150k.json`."""
    rejected: list[Rejection] = []
    records = parse_all(entries, _conversation, "conversations", f"{file.path.name}: ", rejected)
    return InstructFile(records, rejected, len(entries))


def _image(record: str, entry: dict[str, Any]) -> ImageRecord:
    return ImageRecord(record, int64_field(entry, "id"), file_name_field(entry, "file_name"))


def _caption(record: str, entry: dict[str, Any]) -> CaptionRecord:
    caption = " ".join(str_field(entry, "caption").split())
    if not caption:
        raise RecordError("empty caption")
    return CaptionRecord(record, int64_field(entry, "id"), int64_field(entry, "image_id"), caption)


def _conversation(record: str, entry: dict[str, Any]) -> ConversationRecord:
    images = entry.get("image")
    if isinstance(images, list):
        if len(images) != 1:
            raise RecordError(f"not about one image: key 'image' is a list of {len(images)}")
        entry = entry | {"image": images[0]}
    image_name = file_name_field(entry, "image")
    return ConversationRecord(
        record, _conversation_id(entry, image_name), image_name, _turns(entry)
    )


def _conversation_id(entry: dict[str, Any], image_name: str) -> str:
    """Return an entry's id as a text; if it has none, the image's name, as in the official file."""
    conversation_id = entry.get("id")
    if conversation_id is None:
        return PurePosixPath(image_name).stem
    if isinstance(conversation_id, int | float) and not isinstance(conversation_id, bool):
        return str(conversation_id)
    return str_field(entry, "id")


def _turns(entry: dict[str, Any]) -> list[dict[str, str]]:
    messages = field_of_type(entry, "conversations", list)
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
    role = str_field(message, "from")
    if role != wanted:
        raise RecordError(f"not question and answer in turn: {role[:40]!r} instead of {wanted!r}")
    return {"role": ROLES[role], "text": str_field(message, "value").strip()}


def _without_marker(question: str) -> str:
    """Remove one marker at the start or the end of a question.

    A marker on a line of its own comes first, since another may be a word of the question.
    """
    for start, end in ((f"{IMAGE_MARKER}\n", f"\n{IMAGE_MARKER}"), (IMAGE_MARKER, IMAGE_MARKER)):
        if question.startswith(start):
            return question.removeprefix(start).strip()
        if question.endswith(end):
            return question.removesuffix(end).strip()
    return question
