"""Joins the texts of all annotation files with the images.

Decides which captions and conversations are accepted, and gives the reason for each other one.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import xxhash

from pipeline.indexing.annotations import CaptionRecord, CaptionsFile, ConversationRecord
from pipeline.indexing.image_collection import ImageCollection, ImageRow
from pipeline.indexing.records import RecordError, Rejection
from workspace.data_settings import Split


@dataclass(frozen=True, slots=True)
class CaptionRow:
    """A row of `captions.parquet`."""

    caption_id: int
    image_id: int
    split: Split
    caption: str


@dataclass(frozen=True, slots=True)
class ConversationRow:
    """A row of `conversations.parquet`."""

    conversation_id: str
    image_id: int
    split: Literal["train", "holdout"]
    turns: list[dict[str, str]]


def collect_captions(
    files: Mapping[Split, Sequence[CaptionsFile]], images: ImageCollection
) -> tuple[list[CaptionRow], list[Rejection]]:
    """Accept the captions whose image is accepted and listed in their own file.

    Caption ids are unique within a file only: every file may number its captions from 1.
    """
    rows: list[CaptionRow] = []
    rejected = []
    for split, file in ((split, file) for split, of_split in files.items() for file in of_split):
        seen: set[int] = set()
        own_ids = {image.image_id for image in file.images}
        for record in file.captions:
            try:
                image = _image_of(record, split, own_ids, images)
                if record.caption_id in seen:
                    raise RecordError(f"caption id repeated: {record.caption_id}")
            except RecordError as error:
                rejected.append(Rejection("captions", record.record, str(error)))
                continue
            seen.add(record.caption_id)
            rows.append(CaptionRow(record.caption_id, image.image_id, image.split, record.caption))
    return rows, rejected


def _image_of(
    record: CaptionRecord, split: Split, own_ids: Set[int | None], images: ImageCollection
) -> ImageRow:
    """Return the image of a caption in a file of a split.

    Args:
        record: The caption.
        split: The split that its file is of.
        own_ids: The ids in its file: in another file, the same id can be another image.
        images: All images.

    Raises:
        RecordError: The image is unknown, rejected, or of another split or file.
    """
    image_id = record.image
    if isinstance(image_id, str):
        image_id = images.id_of(image_id, split)
    elif image_id not in own_ids:
        raise RecordError(f"image unknown or rejected: {image_id}")
    if problem := images.problems.get(image_id):
        raise RecordError(problem)
    image = images.rows.get(image_id)
    if image is None or image_id not in images.listed[split]:
        raise RecordError(f"image unknown or rejected: {image_id}")
    return image


def collect_conversations(
    records: list[ConversationRecord],
    images: ImageCollection,
    *,
    holdout: float,
    seed: int,
) -> tuple[list[ConversationRow], list[Rejection]]:
    """Accept the conversations about accepted images, and split them by image.

    Args:
        records: The records of the instruct file.
        images: The images; those that only conversations name are added.
        holdout: Share of the images whose conversations are held out for evaluation.
        seed: Decides which images are held out.
    """
    images.add_conversations(records)
    accepted, rejected = [], []
    for record in records:
        try:
            accepted.append((record, images.id_of(record.image_name)))
        except RecordError as error:
            rejected.append(Rejection("conversations", record.record, str(error)))
    held_out = choose_holdout({image_id for _, image_id in accepted}, holdout, seed)
    # Training on an image of val or test would spoil the scores there.
    held_out |= {image_id for image_id, image in images.rows.items() if image.split != "train"}
    # The same holds for a copy of a held-out image in another file.
    contents = {images.rows[image_id].content for image_id in held_out}
    held_out |= {image_id for image_id, image in images.rows.items() if image.content in contents}
    names = unique_ids([record.conversation_id for record, _ in accepted])
    rows = [
        ConversationRow(
            name, image_id, "holdout" if image_id in held_out else "train", record.turns
        )
        for name, (record, image_id) in zip(names, accepted, strict=True)
    ]
    return rows, rejected


def split_by_hash(image_id: int, val_share: float) -> Split:
    """Return the split of an image by its id alone, so that other images never change it.

    A larger share adds images to val, and moves none out of it.

    Args:
        image_id: 64 bits, signed.
        val_share: Expected share of split val, 0 to 1.
    """
    rank = xxhash.xxh3_64_intdigest(struct.pack("<q", image_id))
    return "val" if rank < Fraction(str(val_share)) * 2**64 else "train"


def choose_holdout(image_ids: Iterable[int], share: float, seed: int) -> set[int]:
    """Return the images with the smallest hashes of (seed, id); their number is rounded up.

    Unlike with a shuffle, an additional image hardly changes the choice.
    """

    def rank(image_id: int) -> tuple[int, int]:
        return xxhash.xxh3_64_intdigest(struct.pack("<Qq", seed % 2**64, image_id)), image_id

    # The decimal number of the settings: 0.07 * 100 is 7.000000000000001 in floats.
    ranked = sorted(image_ids, key=rank)
    return set(ranked[: math.ceil(Fraction(str(share)) * len(ranked))])


def unique_ids(names: list[str]) -> Iterator[str]:
    """Yield each name once: the second use of `x` becomes `x#2`, the third `x#3`."""
    taken = set(names)
    uses: Counter[str] = Counter()
    for name in names:
        uses[name] += 1
        unique = name
        while uses[name] > 1 and (unique := f"{name}#{uses[name]}") in taken:
            uses[name] += 1
        taken.add(unique)
        yield unique
