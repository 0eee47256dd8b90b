"""The indexed images: which there are, and their bytes, held against the index."""

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from cache.errors import StageError
from cache.images import ImageArchive, ImageNameError


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
