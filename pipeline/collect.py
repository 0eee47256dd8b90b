"""Brings the records of all annotation files and the image files together.

Decides which image, caption and conversation is kept, and gives the reason for each that is not.
Reads every image file once and decodes none.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Literal

import xxhash
from tqdm import tqdm

from cache.images import ImageArchive, ImageNameError
from pipeline.annotations import CaptionRecord, ConversationRecord, ImageRecord
from pipeline.decode import DecodeError, image_size
from pipeline.records import RecordError, Rejection, image_id_in

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True)
class ImageRow:
    """A row of `images.parquet`."""

    image_id: int
    split: Split
    file_name: str
    width: int
    height: int
    num_bytes: int
    source_xxh3: int


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


class ImageCollection:
    """The images kept so far, found by id and by the name that annotations use."""

    def __init__(self) -> None:
        self.rows: dict[int, ImageRow] = {}
        self.rejected: list[Rejection] = []
        self.num_adopted = 0
        # None: named, but rejected.
        self._ids: dict[str, int | None] = {}

    def add_all(self, records: list[ImageRecord], split: Split, archive: ImageArchive) -> None:
        """Read the files of a split; what cannot be read goes to `rejected`."""
        for record in tqdm(records, desc=f"index {split} images", unit="image", disable=None):
            self._add(record, split, archive)

    def find(self, conversation: ConversationRecord, archive: ImageArchive) -> int:
        """Return the id of a conversation's image.

        An image that no captions file lists is taken from the train archive, with the number at
        the end of its name as its id.

        Raises:
            RecordError: There is no such image, or it is rejected.
        """
        name = conversation.image_name
        base = PurePosixPath(name).name
        if name not in self._ids and base not in self._ids:
            self._adopt(conversation, (name, base), archive)
        image_id = self._ids.get(name, self._ids.get(base))
        if image_id is None:
            raise RecordError(f"image rejected: {name!r}")
        return image_id

    def _adopt(
        self, conversation: ConversationRecord, names: tuple[str, str], archive: ImageArchive
    ) -> None:
        name = next((name for name in names if _is_readable(archive, name)), None)
        if name is None:
            raise RecordError(f"image missing or unreadable: {names[0]!r} in {archive.path}")
        image = ImageRecord(conversation.record, image_id_in(name), name)
        self.num_adopted += 1
        self._add(image, "train", archive)
        # So that the plain name finds it too, however this conversation spells it.
        self._ids.setdefault(names[1], self._ids[name])

    def _add(self, record: ImageRecord, split: Split, archive: ImageArchive) -> None:
        try:
            if record.image_id in self.rows:
                raise RecordError(f"image id repeated: {record.image_id}")
            self.rows[record.image_id] = _read_image(record, split, archive)
        except RecordError as error:
            self.rejected.append(Rejection("images", record.record, str(error)))
            self._ids.setdefault(record.file_name, None)
        else:
            if self._ids.get(record.file_name) is None:
                self._ids[record.file_name] = record.image_id


def _is_readable(archive: ImageArchive, name: str) -> bool:
    try:
        archive.read(name)
    except ImageNameError:
        return False
    return True


def _read_image(record: ImageRecord, split: Split, archive: ImageArchive) -> ImageRow:
    try:
        data = archive.read(record.file_name)
        width, height = image_size(data)
    except ImageNameError as error:
        raise RecordError(f"image missing or unreadable: {error}") from None
    except DecodeError as error:
        raise RecordError(f"not an image: {error}") from None
    return ImageRow(
        image_id=record.image_id,
        split=split,
        file_name=record.file_name,
        width=width,
        height=height,
        num_bytes=len(data),
        source_xxh3=xxhash.xxh3_64_intdigest(data),
    )


def collect_captions(
    files: dict[Split, list[CaptionRecord]], images: dict[int, ImageRow]
) -> tuple[list[CaptionRow], list[Rejection]]:
    """Keep the captions whose image is kept in the split of their own file.

    Caption ids are unique in a file, not over several: makers of files number from 1.
    """
    kept: dict[tuple[Split, int], CaptionRow] = {}
    rejected = []
    for split, records in files.items():
        for record in records:
            image = images.get(record.image_id)
            if image is None or image.split != split:
                reason = f"image unknown or rejected: {record.image_id}"
            elif (split, record.caption_id) in kept:
                reason = f"caption id repeated: {record.caption_id}"
            else:
                kept[split, record.caption_id] = CaptionRow(
                    record.caption_id, record.image_id, split, record.caption
                )
                continue
            rejected.append(Rejection("captions", record.record, reason))
    return list(kept.values()), rejected


def collect_conversations(
    records: list[ConversationRecord],
    images: ImageCollection,
    archive: ImageArchive,
    *,
    holdout: float,
    seed: int,
) -> tuple[list[ConversationRow], list[Rejection]]:
    """Keep the conversations about images that can be read, and split them by image.

    Args:
        records: All usable records of the instruct file.
        images: The listed images; grows by those that only a conversation names.
        archive: The images of the train split.
        holdout: Share of the images whose conversations are kept for evaluation.
        seed: Decides which images these are.
    """
    kept, rejected = [], []
    for record in tqdm(records, desc="index conversations", unit="record", disable=None):
        try:
            kept.append((record, images.find(record, archive)))
        except RecordError as error:
            rejected.append(Rejection("conversations", record.record, str(error)))
    held_out = choose_holdout({image_id for _, image_id in kept}, holdout, seed)
    # Training on an image of val would spoil the scores on val.
    held_out |= {image_id for image_id, image in images.rows.items() if image.split == "val"}
    names = unique_ids([record.conversation_id for record, _ in kept])
    rows = [
        ConversationRow(
            name, image_id, "holdout" if image_id in held_out else "train", record.turns
        )
        for name, (record, image_id) in zip(names, kept, strict=True)
    ]
    return rows, rejected


def choose_holdout(image_ids: Iterable[int], share: float, seed: int) -> set[int]:
    """Return the images with the smallest hashes of (seed, id), the share rounded up.

    Adding images changes little of the choice, which a shuffle would not promise.
    """
    ranked = sorted(image_ids, key=lambda image_id: (_rank(seed, image_id), image_id))
    # As the decimal number in the settings: 0.07 * 100 is 7.000000000000001 in floats.
    return set(ranked[: math.ceil(Fraction(str(share)) * len(ranked))])


def _rank(seed: int, image_id: int) -> int:
    return xxhash.xxh3_64_intdigest(struct.pack("<Qq", seed % 2**64, image_id))


def unique_ids(names: list[str]) -> Iterator[str]:
    """Yield each name, the second use of `x` as `x#2`, the third as `x#3`; none twice."""
    taken = set(names)
    uses: Counter[str] = Counter()
    for name in names:
        uses[name] += 1
        unique = name
        while uses[name] > 1 and (unique := f"{name}#{uses[name]}") in taken:
            uses[name] += 1
        taken.add(unique)
        yield unique
