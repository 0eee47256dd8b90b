"""Fetches shards that DVC has stored, from its cache or, where that lacks them, its remote.

DVC empties `data/features/` before it runs the stage, on a machine that only ever pulled the store
too. `dvc.lock` still names what was there, so none of that needs a second encoding.
"""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from cache.files.atomic import path_in_errors, replacing
from cache.files.foreign import reading_foreign_file
from cache.texts import one_line
from workspace.errors import StageError
from workspace.paths import FEATURES


def recover(names: Collection[str], folder: Path) -> list[str]:
    """Fetch shards of the `data/features/` that dvc.lock in the working directory names.

    Without a DVC repository, or without features in its dvc.lock, there are none. When DVC fails, a
    line says so: what is not fetched can be encoded.

    Args:
        names: File names of shards.
        folder: Each appears here, whole, unless it is here already. It can be one file with DVC's
            own, so it must not be written into; and its bytes are those that DVC has under that
            name, to be checked by whoever uses them.

    Returns:
        The names of those that were fetched.
    """
    lock = Path("dvc.lock")
    with path_in_errors(lock):
        if not lock.is_file() or str(FEATURES) not in lock.read_text():
            return []
    # Importing DVC takes a second or two.
    from dvc.api import DVCFileSystem
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    wanted = {name for name in names if not (folder / name).exists()}
    try:
        # Not even the listing need be anywhere, a remote can need a package that is not installed,
        # and a full disk is an error of the database that DVC keeps.
        with (
            reading_foreign_file(StageError),
            contextlib.suppress(NotDvcRepoError),
            Repo() as repo,
        ):
            _fetch(DVCFileSystem(repo=repo), wanted, folder)
    except (StageError, OSError) as error:
        print(f"extract: DVC gives no shards: {one_line(error)}", flush=True)
    return sorted(name for name in wanted if (folder / name).exists())


def _fetch(stored: Any, names: set[str], folder: Path) -> None:
    if not stored.isdir(str(FEATURES)):
        return
    there = {path.rpartition("/")[2] for path in stored.ls(str(FEATURES), detail=False)}
    lacking = 0
    for name in sorted(there & names):
        try:
            with replacing(folder / name) as temporary:
                stored.get_file(f"{FEATURES}/{name}", str(temporary))
        except FileNotFoundError:
            lacking += 1
    if lacking:
        print(
            f"extract: DVC lacks {lacking} of the shards, in its cache and its remote", flush=True
        )
