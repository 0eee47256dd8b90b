"""The texts of both stages, grouped by image: what the index tables say, as examples."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache import FeatureStore
from cache.errors import StageError
from train.prompts import Text, caption_text, conversation_text

FEATURES = Path("data/features")
CAPTIONS = Path("data/index/captions.parquet")
CONVERSATIONS = Path("data/index/conversations.parquet")

MAX_MISSING_SHARE = 0.5
"""Share of the images with texts that may have no features; with more, the store is another one.
How many may fail to decode is for the extract stage to say."""


@dataclass(frozen=True)
class Example:
    """Everything that is said about one image."""

    image_id: int
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class Question:
    """One question about an image, with its right answer."""

    image_id: int
    question: str
    answer: str


def read_caption_examples(split: str) -> list[Example]:
    """Return the images of a split with their captions, in order of image id."""
    rows = _read(CAPTIONS, ["image_id", "split", "caption"])
    return _grouped(
        (r["image_id"], caption_text(r["caption"])) for r in rows if r["split"] == split
    )


def read_conversation_examples(split: str) -> list[Example]:
    """Return the images of a split with their conversations, in order of image id."""
    return _grouped(
        (row["image_id"], conversation_text(pairs(row["turns"])))
        for row in _read(CONVERSATIONS, ["image_id", "split", "turns"])
        if row["split"] == split
    )


def read_questions(split: str) -> list[Question]:
    """Return every turn of a split's conversations as a question of its own.

    Asked without the turns before it: their right answers would tell about the picture.
    """
    return [
        Question(row["image_id"], question, answer)
        for row in _read(CONVERSATIONS, ["image_id", "split", "turns"])
        if row["split"] == split
        for question, answer in pairs(row["turns"])
    ]


def pairs(turns: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Return question and answer of each turn; the index holds strictly alternating roles."""
    texts = [turn["text"] for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))


def held_out_images() -> set[int]:
    """Return the images whose conversations are kept for evaluation."""
    rows = _read(CONVERSATIONS, ["image_id", "split"])
    return {row["image_id"] for row in rows if row["split"] == "holdout"}


def with_features(examples: list[Example], store: FeatureStore, what: str) -> list[Example]:
    """Leave out the examples whose image failed to decode and so has no features.

    Raises:
        StageError: So many are missing that the store is another one.
    """
    kept = [example for example in examples if example.image_id in store]
    missing = len(examples) - len(kept)
    if missing > MAX_MISSING_SHARE * len(examples):
        raise StageError(
            f"{what}: {missing} of {len(examples)} images have no features in {store.root}. "
            f"Run the index and extract stages on the same data."
        )
    return kept


def _read(path: Path, columns: list[str]) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
    except (FileNotFoundError, pa.ArrowException) as error:
        raise StageError(f"{path}: {error}. Run the index stage, or `dvc pull`.") from None
    return rows


def _grouped(texts: Iterable[tuple[int, Text]]) -> list[Example]:
    by_image: defaultdict[int, list[Text]] = defaultdict(list)
    for image_id, text in texts:
        by_image[image_id].append(text)
    return [Example(image_id, tuple(by_image[image_id])) for image_id in sorted(by_image)]
