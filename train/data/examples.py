"""The texts of both stages, grouped by image, as the index tables hold them.

Texts stay in Arrow's memory until an example is accessed: as Python objects, all of COCO's would
take hundreds of megabytes, and seconds before the first step.

Letters: N examples, M texts.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cache import FeatureStore
from cache.files.parquet import check_values, open_parquet, values_of
from train.data.prompts import Turns, caption_turns, conversation_turns
from workspace.errors import StageError
from workspace.paths import CAPTIONS, CONVERSATIONS

TURNS = "turns.list.element.text"
"""Parquet column of the turns' texts; the roles follow from the order."""

TYPES = {
    "image_id": pa.int64(),
    "split": pa.string(),
    "caption": pa.string(),
    "turns": pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())])),
}
"""Arrow types of the columns, in either table."""

READ_ROWS = 1 << 14
"""Rows of a table that are read at a time."""

MAX_MISSING_SHARE = 0.5
"""Share of the images with texts that may lack features; with more, the store is another one.
The extract stage has its own limit for images that fail to decode."""


@dataclass(frozen=True)
class Example:
    """An image and its texts."""

    image_id: int
    texts: tuple[Turns, ...]


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """The images of a split with their texts, in order of image id.

    An example is built when it is accessed, from any thread.
    """

    image_ids: NDArray[np.int64]
    """int64 [N], ascending."""
    num_texts: NDArray[np.int64]
    """int64 [N], 1 or more."""
    _starts: NDArray[np.int64]
    """int64 [N], where each image's texts begin in `_numbers`."""
    _numbers: NDArray[np.int64]
    """int64 [M], numbers of the texts, grouped by image."""
    _text_of: Callable[[int], Turns]

    @classmethod
    def grouped(cls, image_ids: NDArray[np.int64], text_of: Callable[[int], Turns]) -> "Examples":
        """Group texts by image.

        Args:
            image_ids: int64 [M], the image of each text, in any order.
            text_of: Returns a text by its number, from 0 to M - 1. The texts of an image keep
                their order.
        """
        numbers = np.argsort(image_ids, kind="stable")
        distinct, starts, counts = np.unique(
            image_ids[numbers], return_index=True, return_counts=True
        )
        return cls(distinct, counts, starts, numbers, text_of)

    def __len__(self) -> int:
        return len(self.image_ids)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...
    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self._example(n) for n in range(len(self))[number]]
        return self._example(range(len(self))[number])

    def _example(self, number: int) -> Example:
        start = self._starts[number]
        numbers = self._numbers[start : start + self.num_texts[number]].tolist()
        return Example(int(self.image_ids[number]), tuple(map(self._text_of, numbers)))

    def only(self, image_ids: Collection[int]) -> "Examples":
        """Return the examples of these images."""
        return self.where(self._is_among(image_ids))

    def without(self, image_ids: Collection[int]) -> "Examples":
        """Return the examples of all other images."""
        return self.where(~self._is_among(image_ids))

    def where(self, is_wanted: NDArray[np.bool_]) -> "Examples":
        """Return the examples where a bool [N] is true; their texts are shared, not copied."""
        image_ids, num_texts, starts = (
            column[is_wanted] for column in (self.image_ids, self.num_texts, self._starts)
        )
        return Examples(image_ids, num_texts, starts, self._numbers, self._text_of)

    def _is_among(self, image_ids: Collection[int]) -> NDArray[np.bool_]:
        return np.isin(self.image_ids, np.fromiter(image_ids, np.int64, len(image_ids)))


@dataclass(frozen=True)
class Question:
    """One question about an image, with its right answer."""

    image_id: int
    question: str
    answer: str


def read_caption_examples(split: str) -> Examples:
    """Return the images of a split with their captions, in order of image id."""
    image_ids, captions = _read_texts(CAPTIONS, split, "caption")
    return Examples.grouped(image_ids, lambda number: caption_turns(captions[number].as_py()))


def read_conversation_examples(split: str) -> Examples:
    """Return the images of a split with their conversations, in order of image id."""
    image_ids, turns = _read_texts(CONVERSATIONS, split, TURNS)
    return Examples.grouped(
        image_ids, lambda number: conversation_turns(pairs(turns[number].as_py()))
    )


def read_questions(split: str) -> list[Question]:
    """Return every turn of a split's conversations as a separate question.

    Without the turns before it, whose right answers would tell about the picture.
    """
    image_ids, turns = _read_texts(CONVERSATIONS, split, TURNS)
    return [
        Question(image_id, question, answer)
        for image_id, conversation in zip(image_ids.tolist(), turns.to_pylist(), strict=True)
        for question, answer in pairs(conversation)
    ]


def pairs(turns: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Return question and answer of each turn; roles alternate strictly in the index."""
    texts = [turn["text"] for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


def held_out_images() -> set[int]:
    """Return the images whose conversations are held out for evaluation."""
    return set(values_of(_read(CONVERSATIONS, "holdout")["image_id"]).tolist())


def with_features(examples: Examples, store: FeatureStore, what: str) -> Examples:
    """Drop the examples without features: images that failed to decode.

    Raises:
        StageError: Most features are missing, so the store belongs to other images.
    """
    has_features = store.contains(examples.image_ids)
    missing = int(np.count_nonzero(~has_features))
    if missing > MAX_MISSING_SHARE * len(examples):
        raise StageError(
            f"{what}: {missing} of {len(examples)} images have no features in {store.root}. "
            f"Run the index and extract stages on the same data."
        )
    return examples.where(has_features)


def _read_texts(path: Path, split: str, column: str) -> tuple[NDArray[np.int64], pa.ChunkedArray]:
    """Return the image id and the text of each row of a split, in the table's order."""
    table = _read(path, split, column)
    return values_of(table["image_id"]), table[column.partition(".")[0]]


def _read(path: Path, split: str, *columns: str) -> pa.Table:
    """Read `image_id`, `split` and other columns of the rows of a split."""
    wanted = ["image_id", "split", *columns]
    names = [name.partition(".")[0] for name in wanted]

    def refuse(detail: str) -> StageError:
        return StageError(f"{path}: {detail}. Run the index stage, or `dvc pull`.")

    schema = pa.schema([(name, TYPES[name]) for name in names])
    # pq.read_table would import a module for every kind of data set.
    with open_parquet(path, schema, refuse, read_dictionary=["split"]) as file:
        batches = []
        # In batches: peak memory stays close to that of the result.
        for batch in file.iter_batches(READ_ROWS, columns=wanted, use_threads=False):
            check_values(batch.columns, refuse)
            _check_answered(batch, refuse)
            batches.append(batch.filter(pc.equal(batch["split"], split)))
        read_schema = file.read_row_groups([], columns=wanted).schema
    return pa.Table.from_batches(batches, read_schema).select(names)


def _check_answered(batch: pa.RecordBatch, refuse: Callable[[str], StageError]) -> None:
    if "turns" in batch.schema.names:
        lengths = np.from_dlpack(pc.list_value_length(batch["turns"]))
        if np.any(lengths % 2):
            raise refuse("a conversation in it has a turn without an answer")
