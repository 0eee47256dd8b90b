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


class IndexedImages:
    """All images of the index, and the ids of those that either stage trains on."""

    def __init__(
        self,
        splits: dict[int, str],
        file_names: dict[int, str],
        hashes: dict[int, int],
        trained: Collection[int],
    ) -> None:
        """Store the columns of the index by image id.

        Args:
            splits: Image id to train or val.
            file_names: Image id to file name.
            hashes: Image id to xxh3_64 of the file.
            trained: Ids of the images that are trained on.
        """
        self.splits = splits
        self.file_names = file_names
        self._hashes = hashes
        self._trained = set(trained)
        self._by_hash = {hashes[i]: i for i in sorted(self._trained, reverse=True) if i in hashes}

    def trained_on(self, image_ids: Iterable[int]) -> list[ContaminatedImage]:
        """Return those of some images that were trained on, in order of id."""
        reasons = {image_id: self._reason(image_id) for image_id in sorted(set(image_ids))}
        return [
            ContaminatedImage(image_id, self.file_names.get(image_id, ""), reason)
            for image_id, reason in reasons.items()
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
