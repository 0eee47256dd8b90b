"""Chooses validation pictures for the page to begin with, where the picture files are at hand."""

from pathlib import Path

import pyarrow.compute as pc

from eval.report.thumbnails import read_image_columns
from pipeline.images.archives import ImageArchive
from pipeline.images.decode import DecodeError, image_size
from pipeline.images.names import ImageNameError
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.settings import Params


def validation_pictures(params: Params, folder: Path, most: int) -> list[Path]:
    """Write some pictures of the validation set as files.

    Args:
        params: Names where the images are.
        folder: Where the files go.
        most: How many; evenly spread over the set.

    Returns:
        The files, under the pictures' own names. None where pictures or index are not at hand.
    """
    data = params.section("data", DataSettings)
    try:
        archive = ImageArchive(
            data.val.images, key="data.val.images", follow_links=data.follow_links
        )
        table = read_image_columns("split", "file_name")
    except (StageError, OSError):
        return []
    names = table.filter(pc.equal(table["split"], "val"))["file_name"].to_pylist()
    chosen = [names[n * len(names) // most] for n in range(most)] if len(names) > most else names
    # A folder each: a/1.jpg and b/1.jpg are two pictures.
    places = [(name, folder / str(n)) for n, name in enumerate(chosen)]
    return [path for name, own in places if (path := _write(archive, name, own)) is not None]


def _write(archive: ImageArchive, name: str, folder: Path) -> Path | None:
    try:
        data = archive.read(name)
        image_size(data)
    except (ImageNameError, DecodeError, OSError):
        return None
    folder.mkdir()
    path = folder / Path(name).name
    path.write_bytes(data)
    return path
