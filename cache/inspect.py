"""Command: shows what is in a store, on one screen, or where one of its images is."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .cli.command import command_parser, run_guarded
from .errors import SettingsError
from .files.parquet import read_columns
from .remote.location import Location
from .store import FeatureStore
from .store_index import INDEX_FILE, StoreIndex
from .texts import first_few, human_size, printable, without_passwords

IMAGES = pa.schema({"image_id": pa.int64(), "split": pa.string(), "file_name": pa.string()})
"""Columns of the table of images that are read here."""

MAX_SHOWN = 20
"""Most images of one name that are printed."""


def inspect(root: str) -> None:
    """Print spec, counts and sizes of a store, and the names of its missing shards.

    Args:
        root: Folder or fsspec URL.

    Raises:
        PatchcacheError: Not a store.
    """
    store = FeatureStore(root, partial=True)
    missing = store.missing_shards
    here = store.num_shards - len(missing)
    place = without_passwords(root)
    print(f"{place}: {len(store)} images in {here} shards, {human_size(store.num_bytes)}")
    if missing:
        names = first_few(missing, 3)
        print(f"not here     {len(missing)} of {store.num_shards} shards: {names}")
    if store.origin:
        print(f"shards at    {without_passwords(store.origin)}")
    if len(store):
        print(f"image ids    {store.image_ids[0]} to {store.image_ids[-1]}")
    print(f"features     float16 [{store.spec.patches}, {store.spec.width}] an image")
    print(f"fingerprint  {store.fingerprint}")
    for name, value in store.spec.fields().items():
        # As `repr` spells it: a text from another machine can hold codes that steer a terminal.
        print(f"  {name:<20} {value!r}")


def find_image(root: str, wanted: str, table: Path | None) -> None:
    """Print id, name and place of the images that an id or a file name means.

    Args:
        root: Folder or fsspec URL of the store.
        wanted: An id, a file's full name, or the end of one from a folder on, such as `cat.jpg`.
        table: The table of images, which knows their names; by default `index/images.parquet`
            beside the store.

    Raises:
        SettingsError: No image is meant, or a name is asked for and there is no table.
        PatchcacheError: Not a store, or the table is damaged.
    """
    location = Location(root)
    index = StoreIndex.read(location.path(INDEX_FILE), location.read_spec())
    image_id = _image_id(wanted)
    images = _images_of(root, wanted, table)
    if not images and image_id is not None and image_id in index.image_ids:
        images = [{"image_id": image_id}]
    if not images:
        raise SettingsError(f"--image {wanted}: no image of this id or name is indexed.")
    for image in images[:MAX_SHOWN]:
        image_id, where = image["image_id"], "has no features in this store"
        row = int(np.searchsorted(index.image_ids, image_id))
        if row < len(index.image_ids) and index.image_ids[row] == image_id:
            shard = index.shards[index.shard_number[row]].name
            where = f"row {index.row[row]} of {shard}"
        name = (
            f"{image['file_name']!r}, split {printable(image['split'])}, "
            if "split" in image
            else ""
        )
        print(f"image {image_id}: {name}{where}")
    if len(images) > MAX_SHOWN:
        print(f"and {len(images) - MAX_SHOWN} more")


def _image_id(wanted: str) -> int | None:
    """Return an image id of 64 bits, or None for any other text."""
    number = int(wanted) if re.fullmatch("-?[0-9]{1,19}", wanted) else 2**63
    return number if -(2**63) <= number < 2**63 else None


def _images_of(root: str, wanted: str, table: Path | None) -> list[dict[str, Any]]:
    """Return the rows of the table of images that an id or a name means."""
    path = table or Path(root).resolve().parent / "index" / "images.parquet"
    if table is None and not path.is_file():
        if _image_id(wanted) is not None:
            return []
        raise SettingsError(
            f"--image {wanted}: a store knows ids alone, and {path}, which knows the names, does "
            f"not exist. Name the table with --images, or an id."
        )
    images = read_columns(path, IMAGES, lambda why: SettingsError(f"{path}: {why}."))
    names = images["file_name"]
    is_meant = pc.or_(pc.equal(names, wanted), pc.ends_with(names, f"/{wanted}"))
    if (image_id := _image_id(wanted)) is not None:
        is_meant = pc.or_(is_meant, pc.equal(images["image_id"], image_id))
    found: list[dict[str, Any]] = images.filter(is_meant).to_pylist()
    return found


def main() -> None:
    """Read the command line and inspect."""
    parser = command_parser(__doc__)
    parser.add_argument("root", help="folder or fsspec URL of a store")
    parser.add_argument("--image", metavar="ID_OR_NAME", help="show where this image is")
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FILE",
        help="the index's images.parquet, with the names (default: ../index beside the store)",
    )
    arguments = parser.parse_args()
    if arguments.image is None:
        run_guarded(lambda: inspect(arguments.root))
    else:
        run_guarded(lambda: find_image(arguments.root, arguments.image, arguments.images))


if __name__ == "__main__":
    main()
