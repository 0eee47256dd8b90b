"""Copies files of the store from DVC's cache or, if they are missing there, from its remote.

DVC empties `data/features/` before it runs the stage, even on a machine that only ever pulled the
store. `dvc.lock` still names the former content, so none of it needs to be encoded again.
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
    """Copy files of the `data/features/` that dvc.lock in the working directory records.

    Copies nothing without a DVC repository or without features in its dvc.lock. A failure of DVC
    is printed and not raised: files that are missing can be encoded.

    Args:
        names: File names in the store.
        folder: Where each file appears whole, unless it exists. A file can be a hard link into
            DVC's cache, so it must not be written to; the caller checks its bytes.

    Returns:
        The names that were copied.
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
        # DVC can lack the listing itself or the package of a remote; a full disk surfaces as an
        # error of its database.
        with (
            reading_foreign_file(StageError),
            contextlib.suppress(NotDvcRepoError),
            Repo() as repo,
        ):
            _copy(DVCFileSystem(repo=repo), wanted, folder)
    except (StageError, OSError) as error:
        print(f"extract: DVC gives no shards: {one_line(error)}", flush=True)
    return sorted(name for name in wanted if (folder / name).exists())


def _copy(filesystem: Any, names: set[str], folder: Path) -> None:
    if not filesystem.isdir(str(FEATURES)):
        return
    listed = {path.rpartition("/")[2] for path in filesystem.ls(str(FEATURES), detail=False)}
    num_missing = 0
    for name in sorted(listed & names):
        try:
            with replacing(folder / name) as temporary:
                filesystem.get_file(f"{FEATURES}/{name}", str(temporary))
        except FileNotFoundError:
            num_missing += 1
    if num_missing:
        print(
            f"extract: DVC lacks {num_missing} of the shards, in its cache and its remote",
            flush=True,
        )
