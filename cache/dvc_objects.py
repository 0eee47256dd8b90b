"""Drops damaged files of a store from the cache of DVC, which would bring the damage back.

A published shard and its object in DVC's cache can be one file on the disk, so that damage to one
is damage to both. DVC trusts an object that is write-protected without reading it: it would link
the damaged object over a shard that was encoded again, and restore one that was deleted from it.
"""

import configparser
import contextlib
import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path

from .errors import CacheError
from .files.atomic import CHUNK_BYTES, path_in_errors
from .files.foreign import reading_foreign_file

MD5 = re.compile(r"[0-9a-f]{32}")
"""A listing that was received could name a path instead."""


def drop_damaged_objects(root: Path, names: Collection[str]) -> list[Path]:
    """Delete the objects of some files whose bytes are not those that DVC stored.

    A sound object stays, and so does every object of other files.

    Args:
        root: The store's folder, in a DVC repository or not.
        names: File names of shards, or of other files of a store. Objects that DVC stored under
            such a name in any folder and at any time are looked at.

    Returns:
        The objects that were deleted. Those that DVC needs come back from a remote with
        `dvc pull`, or when the stage runs.
    """
    objects = _objects_folder(root)
    if objects is None:
        return []
    dropped = []
    for md5 in filter(MD5.fullmatch, sorted(_stored_as(objects, names))):
        path = objects / md5[:2] / md5[2:]
        if path.is_file() and _md5_of(path) != md5:
            path.unlink()
            dropped.append(path)
    return dropped


def _objects_folder(root: Path) -> Path | None:
    """Return where DVC keeps the objects of the repository around a folder."""
    folder = root.resolve()
    for settings in (parent / ".dvc" for parent in [folder, *folder.parents]):
        if settings.is_dir():
            return _cache_of(settings) / "files" / "md5"
    return None


def _cache_of(settings: Path) -> Path:
    """Read `cache.dir`; a path in DVC's settings is relative to the file that has it."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    # Damaged settings are for DVC to complain of.
    with contextlib.suppress(configparser.Error):
        parser.read([settings / "config", settings / "config.local"], encoding="utf-8")
    return settings / Path(parser.get("cache", "dir", fallback="cache")).expanduser()


def _stored_as(objects: Path, names: Collection[str]) -> set[str]:
    """Return the md5 of each of the files, in any folder that DVC has stored."""
    return {
        md5
        for listing in objects.glob("*/*.dir")
        if _md5_of(listing) == listing.parent.name + listing.stem  # or it is damaged itself
        for name, md5 in _entries(listing)
        if name in names
    }


def _entries(listing: Path) -> list[tuple[str, str]]:
    """Return name and md5 of each file of a folder that DVC has stored."""
    try:
        with reading_foreign_file(CacheError, listing):
            entries = json.loads(listing.read_bytes())
            return [(e["relpath"].rpartition("/")[2], str(e["md5"])) for e in entries]
    except CacheError:
        # DVC cannot restore a file from a damaged listing either.
        return []


def _md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path_in_errors(path), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
