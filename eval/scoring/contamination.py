"""Finds evaluated images that were trained on: by their id, or by an identical file.

A file that was saved anew, in another size or format, is not found.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from eval.image_table import read_image_columns
from train.data.examples import held_out_images, read_caption_examples, read_conversation_examples


@dataclass(frozen=True)
class ContaminatedImage:
    """An evaluated image that was trained on; the fields are those of `contamination.json`."""

    image_id: int
    file_name: str
    """File name in the index."""
    reason: str


@dataclass(frozen=True)
class IndexedImages:
    """All images of the index, by image id."""

    splits: dict[int, str]
    """Train, val or test."""
    file_names: dict[int, str]
    hashes: dict[int, int]
    """xxh3_64 of the file."""
    trained: Collection[int]
    """Ids of the images that either stage trains on."""

    def trained_on(self, image_ids: Iterable[int]) -> list[ContaminatedImage]:
        """Return those of some images that were trained on, in order of id."""
        trained = set(self.trained)
        by_hash = {self.hashes[i]: i for i in sorted(trained, reverse=True) if i in self.hashes}
        found = []
        for image_id in sorted(set(image_ids)):
            twin = by_hash.get(self.hashes.get(image_id, -1))
            if image_id in trained:
                reason = "trained on"
            elif twin is not None:
                reason = f"same file as training image {twin} ({self.file_names[twin]})"
            else:
                continue
            found.append(ContaminatedImage(image_id, self.file_names.get(image_id, ""), reason))
        return found


def read_images() -> IndexedImages:
    """Read the index.

    Stage 1 trains on the captions of split train except those of held-out images, stage 2 on the
    conversations of split train.

    Raises:
        StageError: A table is missing or damaged.
    """
    captioned = read_caption_examples("train").without(held_out_images())
    conversed = read_conversation_examples("train")
    table = read_image_columns("image_id", "split", "file_name", "source_xxh3")
    image_ids, *columns = (column.to_pylist() for column in table.columns)
    splits, file_names, hashes = (dict(zip(image_ids, c, strict=True)) for c in columns)
    trained = {*captioned.image_ids.tolist(), *conversed.image_ids.tolist()}
    return IndexedImages(splits, file_names, hashes, trained)
