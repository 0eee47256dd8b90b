"""Chooses validation pictures as examples for the served page."""

from pathlib import Path

import pyarrow.compute as pc

from eval.image_table import read_image_columns
from pipeline.images.archives import ImageArchive
from pipeline.images.decode import DecodeError, image_size
from pipeline.images.names import ImageNameError
from pipeline.images.source import open_archives
from workspace.data_settings import DataSettings
from workspace.errors import StageError
from workspace.settings import Params


def validation_pictures(params: Params, folder: Path, count: int) -> list[Path]:
    """Write some pictures of the validation set as files.

    Args:
        params: Settings whose `data` section says where the pictures are.
        folder: Folder for the files.
        count: Number of pictures, evenly spread over the set; fewer if the set is smaller.

    Returns:
        The files under the pictures' own names; empty if this machine lacks the pictures or the
        index.
    """
    data = params.section("data", DataSettings)
    try:
        archive = open_archives(data, ["val"])["val"]
        table = read_image_columns("split", "file_name")
    except (StageError, OSError):
        return []
    names = table.filter(pc.equal(table["split"], "val"))["file_name"].to_pylist()
    if len(names) > count:
        names = [names[n * len(names) // count] for n in range(count)]
    # Each file gets its own folder: a/1.jpg and b/1.jpg are two pictures.
    paths = [_write(archive, name, folder / str(n)) for n, name in enumerate(names)]
    return [path for path in paths if path is not None]


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
