"""The indexed images: which there are, and their bytes, held against the index."""

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.images.names import ImageArchive, ImageNameError
from workspace.errors import StageError


@dataclass(frozen=True)
class ImageSource:
    """The indexed images and where their bytes are; arrays and lists have one entry an image."""

    image_ids: NDArray[np.int64]
    """Ascending."""
    source_xxh3: NDArray[np.uint64]
    file_names: list[str]
    splits: list[str]
    archives: dict[str, ImageArchive]
    """Split to its images."""

    def __post_init__(self) -> None:
        """Refuse ids in which no image can be looked up.

        Raises:
            StageError: They do not ascend, or some are missing.
        """
        if self.image_ids.dtype != np.int64 or np.any(np.diff(self.image_ids) <= 0):
            raise StageError(
                "images.parquet: image_id must be 64-bit numbers that ascend. Run the index stage "
                "again."
            )

    def read(self, image_id: int) -> bytes:
        """Return the bytes of an image file.

        Raises:
            StageError: The file is gone, or is not the one that was indexed.
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
