"""Writes a store from arrays, for features that this project did not make.

Rows may come in any order: they are spooled into a folder within the store's, and when they end,
the set of their images decides the shards. So equal rows give equal bytes, and a killed write
keeps every row. The index is published last.

Letters: N rows, P patches, D width.
"""

import errno
import operator
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .errors import CacheError, InvalidFeaturesError, SettingsError
from .files.atomic import sha256_of, sha256_of_pieces, write_bytes
from .files.locks import exclusive_lock
from .files.row_spool import RowSpool, intact_rows
from .plan import PlannedShard, check_num_shards, plan_shards
from .publish import publish
from .remote.urls import is_url
from .shard import shard_bytes
from .spec import SPEC_FILE, Spec, check_same_spec
from .store import FeatureStore
from .store_index import INDEX_FILE, StoreIndex
from .texts import first_few, human_size

UNFINISHED = ".unfinished"
"""Folder within the store's that holds the rows until the store is published."""

SHARD_ROWS = 1024

TOLERANCE = 2e-2
"""Largest relative L2 difference of two encodings of one image by one encoder: that of the probe in
bf16."""

Row = tuple[int, int, NDArray[np.float16]]


def write_store(
    folder: str | Path, spec: Spec, rows: Iterable[Row], *, shard_rows: int = SHARD_ROWS
) -> FeatureStore:
    """Write a store of some rows, whole or not at all.

    A write that was killed is continued by the same call: the rows that arrived are kept. They may
    be given again, or left out (`unfinished_ids` names them). A row that is given again is compared
    with the one that is kept, which stays; if the image's file has changed, the new row counts. To
    begin anew, delete the folder `.unfinished`.

    A store that the folder held is replaced; files that are no part of a store stay. Until then,
    the disk holds the features twice.

    Args:
        folder: New or empty, of a write that was killed, or of a store of the same spec.
        spec: What the features are; `Spec.external` makes one.
        rows: Image id, xxh3_64 of the image file's bytes, and float16 [P, D] of each image, in any
            order. Ids are at least -2^63 and below 2^63.
        shard_rows: Mean rows of a shard; the largest has twice as many. Memory holds one shard,
            and some 400 bytes an image.

    Returns:
        The store.

    Raises:
        InvalidFeaturesError: A spec or a row that no store can hold, an image that comes twice, no
            row at all, or other features than the store has that would be replaced. The rows before
            it are kept.
        SpecMismatchError: The folder has features of another spec.
        SettingsError: The folder is none that a store can be written to, or `shard_rows` makes more
            shards than a store can have.
        CacheError: Another process writes the store.
        OSError: The system cannot write; a full disk, for one.
    """
    root = _checked_folder(folder)
    spec.check()
    if shard_rows < 1:
        raise InvalidFeaturesError(f"shard_rows is {shard_rows}, wanted 1 or more.")
    work = root / UNFINISHED
    with exclusive_lock(work, CacheError):
        _claim(work, root, spec)
        with RowSpool(work, spec.patches, spec.width) as spool:
            _spool_rows(rows, spec, spool, work)
            plan = plan_shards(*spool.images(), spec.fingerprint, shard_rows)
            check_num_shards(plan, shard_rows)
            if not plan:
                raise InvalidFeaturesError(f"{root}: no row was given, wanted at least one.")
            hashes = _write_shards(plan, spec, spool, work)
        _check_same_shards(root, spec, hashes)
        publish(root, plan, work, spec, hashes)
        shutil.rmtree(work)
    return FeatureStore(root)


def unfinished_ids(folder: str | Path) -> NDArray[np.int64]:
    """Return the images whose rows a killed `write_store` has kept: int64 [N], ascending.

    Empty if there was none. These rows need not be given again.
    """
    work = Path(folder) / UNFINISHED
    if not (work / SPEC_FILE).is_file():
        return np.empty(0, np.int64)
    spec = Spec.read(work / SPEC_FILE)
    rows = intact_rows(work, spec.patches * spec.width * 2)
    return np.unique(np.array([row[0] for row in rows if row is not None], np.int64))


def _checked_folder(folder: str | Path) -> Path:
    """Refuse a URL, and a folder that holds other files and neither a store nor its rows."""
    if is_url(folder):
        raise SettingsError(
            f"{folder}: stores are written to folders. Write it here, then `python -m "
            f"{__package__}.push` it there."
        )
    root = Path(folder)
    work = root / UNFINISHED
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        # A link's target would be filled, and could not be deleted.
        raise SettingsError(
            f"{work}: a link, or no folder. Delete it, and run the same program again."
        )
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    # The spec is written before the index: an index alone is of another program.
    is_store = {SPEC_FILE, INDEX_FILE} <= names
    is_unfinished = UNFINISHED in names and INDEX_FILE not in names
    if names and not (is_store or is_unfinished):
        raise SettingsError(
            f"{root}: holds {first_few(sorted(names))} and is no store. Wanted a new or empty "
            f"folder."
        )
    return root


def _claim(work: Path, root: Path, spec: Spec) -> None:
    """Refuse a folder with features of another spec; note the spec in the work folder.

    Raises:
        SpecMismatchError: Names the fields that differ.
    """
    if (root / SPEC_FILE).is_file():
        check_same_spec(Spec.read(root / SPEC_FILE), spec, str(root))
    if (work / SPEC_FILE).is_file():
        check_same_spec(Spec.read(work / SPEC_FILE), spec, f"{work} (delete it to begin anew)")
    else:
        write_bytes(work / SPEC_FILE, spec.to_json())


def _spool_rows(rows: Iterable[Row], spec: Spec, spool: RowSpool, work: Path) -> None:
    given: set[int] = set()
    for number, row in enumerate(tqdm(rows, desc="write", unit="image", disable=None)):
        image_id, source_xxh3, features_PD = _checked_row(row, number, spec)
        if image_id in given:
            raise InvalidFeaturesError(
                f"row {number}: image {image_id} comes a second time. Give each image once."
            )
        given.add(image_id)
        if spool.source_xxh3(image_id) == source_xxh3:
            _check_same_encoder(features_PD, spool.gather([image_id])[0], image_id, work)
        else:
            spool.append(image_id, source_xxh3, features_PD)


def _checked_row(row: Any, number: int, spec: Spec) -> Row:
    """Return id, hash and features of a row as Python integers and a little-endian array.

    Raises:
        InvalidFeaturesError: A row that no store can hold.
    """
    try:
        image_id, source_xxh3, features = row
        image_id, source_xxh3 = operator.index(image_id), operator.index(source_xxh3)
    except (TypeError, ValueError):
        raise InvalidFeaturesError(
            f"row {number}: is no (image_id, source_xxh3, features) of two whole numbers and an "
            f"array."
        ) from None
    where = f"row {number}: image {image_id}:"
    if not -(2**63) <= image_id < 2**63:
        raise InvalidFeaturesError(f"{where} ids are int64, so from -2^63 to 2^63 - 1.")
    if not 0 <= source_xxh3 < 2**64:
        raise InvalidFeaturesError(
            f"{where} source_xxh3 is {source_xxh3}, wanted an unsigned number of 64 bits: "
            f"xxhash.xxh3_64_intdigest of the image file's bytes."
        )
    features_PD = np.asarray(features)
    wanted = spec.patches, spec.width
    if features_PD.dtype != np.float16 or features_PD.shape != wanted:
        raise InvalidFeaturesError(
            f"{where} its features are {features_PD.dtype} {features_PD.shape}, wanted float16 "
            f"{wanted} (patches and width of the spec). Cast once, after the last computation."
        )
    if not np.isfinite(features_PD).all():
        raise InvalidFeaturesError(
            f"{where} {int((~np.isfinite(features_PD)).sum())} of its values are not finite. "
            f"float16 ends at 65504: take another layer, or scale the features and say so in "
            f"the spec."
        )
    return image_id, source_xxh3, np.ascontiguousarray(features_PD, "<f2")


def _check_same_encoder(
    given_PD: NDArray[np.float16], kept_PD: NDArray[np.float16], image_id: int, work: Path
) -> None:
    """Refuse a row that another encoder made than the kept row of the same image file."""
    given, kept = given_PD.astype(np.float64), kept_PD.astype(np.float64)
    difference = float(np.linalg.norm(given - kept))
    if difference > TOLERANCE * float(np.linalg.norm(kept)):
        raise InvalidFeaturesError(
            f"image {image_id}: its features are not those that the killed write has kept "
            f"(L2 difference {difference:.3g}, of {np.linalg.norm(kept):.3g}), so the encoder has "
            f"changed. Delete {work} to begin anew."
        )


def _write_shards(
    plan: list[PlannedShard], spec: Spec, spool: RowSpool, work: Path
) -> dict[str, str]:
    """Write the planned shards that a killed write has not finished; return all their sha256."""
    unfinished = [shard for shard in plan if not (work / shard.name).is_file()]
    _check_space(work, sum(len(shard.image_ids) for shard in unfinished), spec)
    hashes = {}
    for shard in tqdm(plan, desc="write", unit="shard", disable=None):
        features_NPD = spool.gather(shard.image_ids.tolist())
        pieces = shard_bytes(spec, shard.image_ids, features_NPD)
        path, digest = work / shard.name, sha256_of_pieces(pieces)
        if not path.is_file() or sha256_of(path) != digest:
            write_bytes(path, *pieces)
        hashes[shard.name] = digest
    return hashes


def _check_same_shards(root: Path, spec: Spec, hashes: dict[str, str]) -> None:
    """Refuse other bytes under the name of a shard of the store that the folder holds.

    The new shard would stand under the old index: readers would mix the features of both, and a
    kill before the new index would leave neither store.
    """
    if not (root / INDEX_FILE).is_file():
        return
    try:
        former = StoreIndex.read(root / INDEX_FILE, spec).shards
    except CacheError:
        # No store that anybody could read.
        return
    changed = [
        shard.name for shard in former if hashes.get(shard.name, shard.sha256) != shard.sha256
    ]
    if changed:
        raise InvalidFeaturesError(
            f"{root}: holds other features of the same images under the same spec, in shards: "
            f"{len(changed)}, the first: {changed[0]}. If the encoder has changed, say so in the "
            f"spec, and write to another folder. To replace this store, delete "
            f"{root / INDEX_FILE} and run the same program again: the rows are kept."
        )


def _check_space(work: Path, num_rows: int, spec: Spec) -> None:
    needed, free = num_rows * spec.patches * spec.width * 2, shutil.disk_usage(work).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"the shards need {human_size(needed)}, {human_size(needed - free)} more than is free. "
            f"Make room and run the same program again: the rows are kept",
            str(work),
        )
