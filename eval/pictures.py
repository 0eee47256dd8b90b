"""Small copies of the pictures for the report page, where the images are at hand."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from cache.data_settings import DataSettings
from cache.errors import StageError
from cache.images import ImageArchive, ImageNameError
from eval.report import Example, choose_examples, thumbnail_uri

IMAGES = Path("data/index/images.parquet")


def with_thumbnails(examples: Sequence[Example], data: DataSettings) -> list[Example]:
    """Choose what the page shows and add the pictures.

    A machine that trains from received features has no images; the page then says so.
    """
    chosen = [e for kind in choose_examples(examples).values() for g in kind.values() for e in g]
    names = _files({example.image_id for example in chosen})
    archives = {split: _archive(split, data) for split in ("train", "val")}
    return [
        dataclasses.replace(example, thumbnail=_thumbnail(*names[example.image_id], archives))
        for example in chosen
    ]


def _files(image_ids: set[int]) -> dict[int, tuple[str, str]]:
    """Return split and file name of some images."""
    rows = pq.read_table(
        IMAGES,
        columns=["image_id", "split", "file_name"],
        filters=[("image_id", "in", sorted(image_ids))],
    ).to_pylist()
    return {row["image_id"]: (row["split"], row["file_name"]) for row in rows}


def _archive(split: str, data: DataSettings) -> ImageArchive | None:
    path = data.train.images if split == "train" else data.val.images
    try:
        return ImageArchive(path, key=f"data.{split}.images")
    except StageError:
        return None


def _thumbnail(split: str, file_name: str, archives: dict[str, ImageArchive | None]) -> str | None:
    archive = archives[split]
    if archive is None:
        return None
    try:
        return thumbnail_uri(archive.read(file_name))
    except (ImageNameError, OSError, Image.DecompressionBombError):
        # The features were received from elsewhere and this image was not.
        return None
