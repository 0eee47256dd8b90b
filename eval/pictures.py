"""Small copies of the pictures for the report page, where the images are at hand."""

import dataclasses
import struct
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cache.data_settings import DataSettings
from cache.errors import StageError
from cache.images import ImageArchive
from eval.report import Example, choose_examples, thumbnail_uri

IMAGES = Path("data/index/images.parquet")

_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)
"""A name that no file has, and what Pillow raises on broken files: a damaged PNG is a SyntaxError,
damaged EXIF a TypeError."""


def with_thumbnails(examples: Sequence[Example], data: DataSettings) -> list[Example]:
    """Choose what the page shows and add the pictures.

    A machine that trains from received features has no images; the page then says so.
    """
    chosen = [e for kind in choose_examples(examples).values() for g in kind.values() for e in g]
    names = _files({example.image_id for example in chosen})
    archives = {split: _archive(split, data) for split in ("train", "val")}
    return [
        dataclasses.replace(example, thumbnail=_thumbnail(*names[example.image_id], archives))
        if example.image_id in names
        else example
        for example in chosen
    ]


def _files(image_ids: set[int]) -> dict[int, tuple[str, str]]:
    """Return split and file name of some images; an image that the index lacks is left out.

    Raises:
        StageError: No such table, or a damaged one.
    """
    try:
        rows = pq.read_table(
            IMAGES,
            columns=["image_id", "split", "file_name"],
            filters=[("image_id", "in", sorted(image_ids))],
        ).to_pylist()
    except (FileNotFoundError, pa.ArrowException) as error:
        raise StageError(f"{IMAGES}: {error}. Run the index stage, or `dvc pull`.") from None
    return {row["image_id"]: (row["split"], row["file_name"]) for row in rows}


def _archive(split: str, data: DataSettings) -> ImageArchive | None:
    path = data.train.images if split == "train" else data.val.images
    try:
        return ImageArchive(path, key=f"data.{split}.images")
    except StageError:
        return None


def _thumbnail(split: str, file_name: str, archives: dict[str, ImageArchive | None]) -> str | None:
    archive = archives.get(split)
    if archive is None:
        return None
    try:
        return thumbnail_uri(archive.read(file_name))
    except _UNREADABLE:
        # The features were received from elsewhere and this image was not, or came damaged.
        return None
