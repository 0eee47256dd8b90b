"""Small copies of the pictures for the report page, where the images are at hand."""

import base64
import io
from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from cache.files.parquet import read_columns
from pipeline.images.archives import ImageArchive
from pipeline.images.decode import DecodeError, decode_upright
from pipeline.images.names import ImageNameError
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.paths import IMAGES

TYPES = {
    "image_id": pa.int64(),
    "split": pa.string(),
    "file_name": pa.string(),
    "source_xxh3": pa.uint64(),
}
"""Of the columns that are read."""

_JPEG_QUALITY = 80


def read_image_columns(*names: str) -> pa.Table:
    """Read columns of the table of images.

    Raises:
        StageError: No such table, or a damaged one.
    """
    schema = pa.schema([(name, TYPES[name]) for name in names])
    return read_columns(
        IMAGES,
        schema,
        lambda detail: StageError(f"{IMAGES}: {detail}. Run the index stage, or `dvc pull`."),
    )


def thumbnails_of(image_ids: Collection[int], data: DataSettings) -> dict[int, str]:
    """Make small copies of some images as data URIs.

    Args:
        image_ids: COCO image ids.
        data: Where the images of each split lie.

    Returns:
        Image id to data URI, in ascending order. An image that is not at hand, is not the file
        that was indexed, or does not decode is left out: a machine that trains from received
        features has none, or others under the same names.

    Raises:
        StageError: No table of images, or a damaged one.
    """
    archives = {split: _archive(split, data) for split in ("train", "val")}
    made = {image_id: _thumbnail(row, archives) for image_id, row in _rows(image_ids).items()}
    return {image_id: uri for image_id, uri in made.items() if uri is not None}


def thumbnail_uri(image_bytes: bytes, side: int = 224) -> str:
    """Shrink a picture for the page.

    Args:
        image_bytes: A picture file.
        side: Largest width and height of the result, in pixels.

    Returns:
        Data URI of a JPEG, without the metadata of the picture.

    Raises:
        DecodeError: The bytes are no picture, or a cut one.
    """
    # As the encoder saw it.
    picture = decode_upright(image_bytes)
    picture.thumbnail((side, side))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


def _rows(image_ids: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return what the index says of some images, in ascending order, of those that it has.

    Raises:
        StageError: No such table, or a damaged one.
    """
    table = read_image_columns("image_id", "split", "file_name", "source_xxh3")
    wanted = pa.array(sorted(image_ids), pa.int64())
    rows = table.filter(pc.is_in(table["image_id"], wanted)).to_pylist()
    return {row["image_id"]: row for row in sorted(rows, key=lambda row: row["image_id"])}


def _archive(split: str, data: DataSettings) -> ImageArchive | None:
    path = data.train.images if split == "train" else data.val.images
    try:
        return ImageArchive(path, key=f"data.{split}.images", follow_links=data.follow_links)
    except StageError:
        return None


def _thumbnail(row: dict[str, Any], archives: dict[str, ImageArchive | None]) -> str | None:
    archive = archives.get(row["split"])
    if archive is None:
        return None
    try:
        data = archive.read(row["file_name"])
        is_indexed = xxhash.xxh3_64_intdigest(data) == row["source_xxh3"]
        return thumbnail_uri(data) if is_indexed else None
    except (ImageNameError, DecodeError):
        # The features were received from elsewhere and this image was not, or came damaged.
        return None
