"""Deletes damaged files of a store from DVC's cache, from which DVC would restore the damage.

A published shard and its object in DVC's cache can be one file on the disk, damaged together. DVC
trusts a write-protected object without reading it: it would link the damaged object over a shard
that was encoded again, and restore a deleted shard from it.
"""

import configparser
import contextlib
import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path

from .errors import CacheError
from .files.atomic import path_in_errors
from .files.foreign import reading_foreign_file

MD5 = re.compile(r"[0-9a-f]{32}")
"""A listing from another machine could hold a path instead."""


def drop_damaged_objects(root: Path, names: Collection[str]) -> list[Path]:
    """Delete the damaged objects of some files.

    Args:
        root: The store's folder, in a DVC repository or not.
        names: File names of shards, or of other files of a store. All objects that DVC ever stored
            under such a name, in any folder, are checked.

    Returns:
        The deleted objects. `dvc pull` or the stage brings back those that DVC needs.
    """
    objects = _objects_folder(root)
    if objects is None:
        return []
    deleted = []
    for md5 in filter(MD5.fullmatch, sorted(_stored_as(objects, names))):
        path = objects / md5[:2] / md5[2:]
        if path.is_file() and _md5_of(path) != md5:
            path.unlink()
            deleted.append(path)
    return deleted


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
    # DVC itself reports damaged settings.
    with contextlib.suppress(configparser.Error):
        parser.read([settings / "config", settings / "config.local"], encoding="utf-8")
    return settings / Path(parser.get("cache", "dir", fallback="cache")).expanduser()


def _stored_as(objects: Path, names: Collection[str]) -> set[str]:
    """Return all md5 under which DVC has stored files of these names."""
    return {
        md5
        for listing in objects.glob("*/*.dir")
        if _md5_of(listing) == listing.parent.name + listing.stem  # a listing can be damaged, too
        for name, md5 in _entries(listing)
        if name in names
    }


def _entries(listing: Path) -> list[tuple[str, str]]:
    """Return name and md5 of each file in DVC's listing of a folder."""
    try:
        with reading_foreign_file(CacheError, listing):
            entries = json.loads(listing.read_bytes())
            return [(e["relpath"].rpartition("/")[2], str(e["md5"])) for e in entries]
    except CacheError:
        # DVC cannot restore a file from a damaged listing either.
        return []


def _md5_of(path: Path) -> str:
    with path_in_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
