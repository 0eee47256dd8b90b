"""Reads the index's table of images."""

import pyarrow as pa

from cache.files.parquet import read_columns
from workspace.errors import StageError
from workspace.paths import IMAGES

TYPES = {
    "image_id": pa.int64(),
    "split": pa.string(),
    "file_name": pa.string(),
    "source_xxh3": pa.uint64(),
}
"""The columns that can be read."""


def read_image_columns(*names: str) -> pa.Table:
    """Read columns of `images.parquet`, named as in `TYPES`.

    Raises:
        StageError: The table is missing or damaged.
    """
    schema = pa.schema([(name, TYPES[name]) for name in names])

    def refuse(detail: str) -> StageError:
        return StageError(f"{IMAGES}: {detail}. Run the index stage, or `dvc pull`.")

    return read_columns(IMAGES, schema, refuse)
