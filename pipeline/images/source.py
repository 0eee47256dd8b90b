"""The indexed images: their ids, and their bytes, checked against the index."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from cache.files.parquet import read_columns, values_of
from pipeline.images.archives import ImageArchive
from pipeline.images.names import ImageNameError
from workspace.data_settings import DataSettings, Split
from workspace.errors import StageError
from workspace.paths import IMAGES

TEXT = pa.string()
COLUMNS = pa.schema(
    {"image_id": pa.int64(), "split": TEXT, "file_name": TEXT, "source_xxh3": pa.uint64()}
)
"""The columns of the table of images that are read here."""


@dataclass(frozen=True)
class ImageSource:
    """The indexed images; each array and list has one entry per image."""

    image_ids: NDArray[np.int64]
    """Ascending."""
    source_xxh3: NDArray[np.uint64]
    file_names: list[str]
    splits: list[str]
    archives: Mapping[str, ImageArchive]
    """Image files by split."""

    def __post_init__(self) -> None:
        """Refuse ids that a binary search cannot find.

        Raises:
            StageError: The ids do not ascend, or some are missing.
        """
        if self.image_ids.dtype != np.int64 or np.any(np.diff(self.image_ids) <= 0):
            raise StageError(
                "images.parquet: image_id must be 64-bit numbers that ascend. Run the index stage "
                "again."
            )

    def read(self, image_id: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            StageError: The file is missing, or its bytes are not the indexed ones.
        """
        position = int(np.searchsorted(self.image_ids, image_id))
        archive, name = self.archives[self.splits[position]], self.file_names[position]
        try:
            data = archive.read(name)
        except ImageNameError as error:
            raise StageError(f"{archive.path}: {error}. Run the index stage again.") from None
        if xxhash.xxh3_64_intdigest(data) != self.source_xxh3[position]:
            raise StageError(
                f"{archive.path}: {name} is not the file that was indexed. "
                f"Run the index stage again."
            )
        return data


def read_source() -> ImageSource:
    """Read the index of the workspace; the image files are not opened.

    Raises:
        StageError: The index is missing or empty.
    """
    table = read_columns(
        IMAGES,
        COLUMNS,
        lambda detail: StageError(f"{IMAGES}: {detail}. Run the index stage first."),
    )
    if not table.num_rows:
        raise StageError(f"{IMAGES}: holds no image. Check the section data and run index.")
    return ImageSource(
        image_ids=values_of(table["image_id"]),
        source_xxh3=values_of(table["source_xxh3"]),
        file_names=table["file_name"].to_pylist(),
        splits=table["split"].to_pylist(),
        archives={},
    )


def open_images(source: ImageSource, data: DataSettings) -> ImageSource:
    """Return a source whose image files are opened where the settings say.

    Raises:
        StageError: A split is unknown, or its images are missing.
    """
    known: list[Split] = [split for split in get_args(Split) if split in source.splits]
    if unknown := set(source.splits).difference(known):
        raise StageError(f"{IMAGES}: unknown splits {sorted(unknown)}. Run the index stage again.")
    archives: Mapping[Any, ImageArchive] = open_archives(data, known)
    return dataclasses.replace(source, archives=archives)


def open_archives(data: DataSettings, splits: Iterable[Split]) -> dict[Split, ImageArchive]:
    """Open the places of the images of some splits, each set of places once.

    Raises:
        StageError: A place is missing or cannot be read, or the settings name none for a split.
    """
    named_for: dict[Split, Split] = {
        split: split if split in data.splits else "train" for split in splits
    }
    if data.split_name == "val2017" and "test" in named_for:
        raise StageError(
            f"data.split: {data.split}: has no split test, of which {IMAGES} has images. Run the "
            f"index stage again."
        )
    opened: dict[Split, ImageArchive] = {
        split: ImageArchive(
            data.splits[split].image_paths,
            key=f"data.{split}.images",
            follow_links=data.follow_links,
        )
        for split in data.splits
        if split in named_for.values()
    }
    return {split: opened[name] for split, name in named_for.items()}
