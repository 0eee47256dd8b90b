"""Chooses validation pictures for the page to begin with, where the picture files are at hand."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cache.data_settings import DataSettings
from cache.errors import StageError
from cache.images import ImageArchive, ImageNameError
from cache.settings import Params
from eval.pictures import IMAGES
from pipeline.decode import DecodeError, image_size


def validation_pictures(params: Params, folder: Path, most: int) -> list[Path]:
    """Write some pictures of the validation set as files.

    Args:
        params: Names where the images are.
        folder: Where the files go.
        most: How many; evenly spread over the set.

    Returns:
        The files. None where pictures or index are not at hand.
    """
    data = params.section("data", DataSettings)
    try:
        archive = ImageArchive(data.val.images, key="data.val.images")
        table = pq.read_table(IMAGES, columns=["file_name"], filters=[("split", "==", "val")])
    except (StageError, FileNotFoundError, pa.ArrowException):
        return []
    names = table["file_name"].to_pylist()
    chosen = [names[n * len(names) // most] for n in range(most)] if len(names) > most else names
    return [path for name in chosen if (path := _write(archive, name, folder)) is not None]


def _write(archive: ImageArchive, name: str, folder: Path) -> Path | None:
    try:
        data = archive.read(name)
        image_size(data)
    except (ImageNameError, DecodeError):
        return None
    path = folder / Path(name).name
    path.write_bytes(data)
    return path
