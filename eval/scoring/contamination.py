"""Finds images that are trained on and evaluated on: by id, or because their files are the same.

A file that was saved anew, in another size or format, is not found.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from eval.report.thumbnails import read_image_columns
from train.data.examples import held_out_images, read_caption_examples, read_conversation_examples


@dataclass(frozen=True)
class ContaminatedImage:
    """An image of the evaluation that was trained on."""

    image_id: int
    file_name: str
    """Name of its file in the index."""
    reason: str


class IndexedImages:
    """All images of the index, and which of them either stage trains on."""

    def __init__(
        self,
        splits: dict[int, str],
        file_names: dict[int, str],
        hashes: dict[int, int],
        trained: Collection[int],
    ) -> None:
        """Remember them.

        Args:
            splits: Image id to train or val, of all images.
            file_names: Image id to the name of its file, of all images.
            hashes: Image id to the hash of its file, of all images.
            trained: Those that are trained on.
        """
        self.splits = splits
        self.file_names = file_names
        self._hashes = hashes
        self._trained = set(trained)
        self._by_hash = {hashes[i]: i for i in sorted(self._trained, reverse=True) if i in hashes}

    def trained_on(self, image_ids: Iterable[int]) -> list[ContaminatedImage]:
        """Return those of some images that were trained on, in order of id."""
        pairs = ((image_id, self._reason(image_id)) for image_id in sorted(set(image_ids)))
        return [
            ContaminatedImage(image_id, self.file_names.get(image_id, ""), reason)
            for image_id, reason in pairs
            if reason
        ]

    def _reason(self, image_id: int) -> str:
        if image_id in self._trained:
            return "trained on"
        if image_id not in self._hashes or self._hashes[image_id] not in self._by_hash:
            return ""
        twin = self._by_hash[self._hashes[image_id]]
        return f"same file as training image {twin} ({self.file_names[twin]})"


def read_images() -> IndexedImages:
    """Read the index: captions are trained on but for held-out images', conversations of train.

    Raises:
        StageError: A table is missing or damaged.
    """
    captioned = read_caption_examples("train").without(held_out_images())
    conversed = read_conversation_examples("train")
    trained = {*captioned.image_ids.tolist(), *conversed.image_ids.tolist()}
    table = read_image_columns("image_id", "split", "file_name", "source_xxh3")
    image_ids, splits, file_names, hashes = (column.to_pylist() for column in table.columns)
    return IndexedImages(
        dict(zip(image_ids, splits, strict=True)),
        dict(zip(image_ids, file_names, strict=True)),
        dict(zip(image_ids, hashes, strict=True)),
        trained,
    )


def counts(
    num_images: int, found: Collection[ContaminatedImage], *, left_out: bool
) -> dict[str, Any]:
    """Return the numbers of eval.json: images, those found, and those left out for it."""
    return {
        "images": num_images,
        "contaminated": len(found),
        "left_out": len(found) if left_out else 0,
    }
