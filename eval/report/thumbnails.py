"""Makes small copies of the pictures for the report page, where the image files are at hand."""

import base64
import io
from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from eval.image_table import read_image_columns
from pipeline.images.archives import ImageArchive
from pipeline.images.decode import DecodeError, decode_upright
from pipeline.images.names import ImageNameError
from pipeline.images.source import open_archives
from workspace.data_settings import DataSettings
from workspace.errors import StageError

_JPEG_QUALITY = 80


def thumbnails_of(image_ids: Collection[int], data: DataSettings) -> dict[int, str]:
    """Make small copies of some images as data URIs.

    Args:
        image_ids: COCO image ids.
        data: Where the images of each split lie.

    Returns:
        Image id to data URI, in ascending order of id. An image whose file is missing, does not
        decode or is not the indexed one is left out: a machine that trains from received features
        may have no images, or other images under the same names.

    Raises:
        StageError: The table of images is missing or damaged.
    """
    rows = _rows(image_ids)
    archives = {split: _archive(split, data) for split in {row["split"] for row in rows.values()}}
    made = {image_id: _thumbnail(row, archives) for image_id, row in rows.items()}
    return {image_id: uri for image_id, uri in made.items() if uri is not None}


def thumbnail_uri(image_bytes: bytes, side: int = 224) -> str:
    """Shrink a picture for the page.

    Args:
        image_bytes: Content of an image file.
        side: Largest width and height of the result, in pixels.

    Returns:
        Data URI of a JPEG without the picture's metadata.

    Raises:
        DecodeError: The bytes are not a whole picture.
    """
    # The encoder turns pictures upright too.
    picture = decode_upright(image_bytes)
    picture.thumbnail((side, side))
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


def _rows(image_ids: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return the index's rows of some images, in ascending order of id."""
    table = read_image_columns("image_id", "split", "file_name", "source_xxh3")
    wanted = pa.array(sorted(image_ids), pa.int64())
    rows = table.filter(pc.is_in(table["image_id"], wanted)).to_pylist()
    return {row["image_id"]: row for row in sorted(rows, key=lambda row: row["image_id"])}


def _archive(split: str, data: DataSettings) -> ImageArchive | None:
    try:
        return open_archives(data, [split])[split]
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
        return None
