"""Checks every file of a store: what `FeatureStore.verify` and `python -m cache.verify` find.

Shallow looks at sizes, structure and the index. Deep reads each shard once, in blocks, and holds
the bytes against the file's sha256, each row's hash, and finite numbers; shards are checked side by
side, since hashing leaves the GIL.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import (
    REMEDY,
    CorruptShardError,
    FormatVersionError,
    PatchcacheError,
    SpecMismatchError,
    UnreachableStoreError,
)
from .files.atomic import path_in_errors, sha256_of
from .plan import shard_key
from .remote.location import Location
from .shard import Shard, hash_rows, open_shard
from .spec import MAX_JSON_BYTES, SPEC_FILE, Spec
from .store_index import INDEX_FILE, PROBE_FILE, StoreIndex, check_own_hash
from .texts import first_few, one_line

BLOCK_BYTES = 1 << 20
"""What is read at a time: small enough for a core's cache, so that memory is read once."""

MAGNITUDE, INFINITY = np.uint16(0x7FFF), 0x7C00
"""Of a float16's bits: all but the sign, and the smallest magnitude that is not finite."""


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found."""

    ok: bool
    problems: list[str] = field(default_factory=list)
    """One line each."""
    bad_files: list[str] = field(default_factory=list)
    """Names of the files that are not as they were written, which extracting again would mend. A
    file that could not be read or fetched, or of another version of the format, is none of them."""
    unreadable: list[str] = field(default_factory=list)
    """Those of the problems that are failures of the system: nothing is known of such a file."""


Problems = list[tuple[str, PatchcacheError | OSError]]
"""File name, and what is wrong with it."""


Progress = Callable[[int, int], object]


def audit(
    location: Location,
    *,
    deep: bool,
    partial: bool = False,
    progress: Progress = lambda done, total: None,
) -> VerifyReport:
    """Check a store.

    Args:
        location: Where it is.
        deep: Also read every byte of the shards.
        partial: Whether shards may be missing.
        progress: Told how many more bytes of features were checked, and of how many in all; from
            several threads.
    """
    checked = "spec.json"
    try:
        with location.url_in_errors():
            spec = _check_spec(location)
            checked = INDEX_FILE
            table = _check_index(location, spec)
    except (PatchcacheError, OSError) as error:
        # Without them nothing can be said about the shards.
        return _report([(checked, error)])

    row_bytes = spec.patches * spec.width * np.dtype("<f2").itemsize
    total = len(table.image_ids) * row_bytes

    def tell(done: int) -> None:
        progress(done, total)

    def check(number: int) -> PatchcacheError | OSError | None:
        file = table.shards[number]
        try:
            with location.url_in_errors():
                if not (partial and location.size(file.name) is None):
                    _check_shard(location, spec, table, number, tell if deep else None)
        except (PatchcacheError, OSError) as error:
            return error
        return None

    # More threads than cores: while some hash, others wait for the disk.
    with ThreadPoolExecutor() as threads:
        found = threads.map(check, range(len(table.shards)))
        bad_shards = [
            (f.name, error) for f, error in zip(table.shards, found, strict=True) if error
        ]
    return _report([*bad_shards, *_check_probe(location, table)])


def _report(problems: Problems) -> VerifyReport:
    lines = [one_line(problem) for _, problem in problems]
    bad_files = [
        name
        for name, problem in problems
        if isinstance(problem, PatchcacheError)
        and not isinstance(problem, FormatVersionError | UnreachableStoreError)
    ]
    unreadable = [
        line
        for line, (_, problem) in zip(lines, problems, strict=True)
        if not isinstance(problem, PatchcacheError)
    ]
    return VerifyReport(not problems, lines, bad_files, unreadable)


def _check_spec(location: Location) -> Spec:
    path = location.path(SPEC_FILE, MAX_JSON_BYTES)
    spec = Spec.read(path)
    with path_in_errors(path):
        data = path.read_bytes()
    if data != spec.to_json():
        raise SpecMismatchError(
            f"{path}: is not spelled as canonical JSON, so not as it was written. {REMEDY}"
        )
    return spec


def _check_index(location: Location, spec: Spec) -> StoreIndex:
    path = location.path(INDEX_FILE)
    check_own_hash(path)
    return StoreIndex.read(path, spec)


def _check_probe(location: Location, table: StoreIndex) -> Problems:
    if table.probe_sha256 is None:
        return []
    try:
        path = location.path(PROBE_FILE, sha256=table.probe_sha256)
        if sha256_of(path) != table.probe_sha256:
            raise CorruptShardError(f"{path}: its sha256 is not the one in {INDEX_FILE}. {REMEDY}")
        return []
    except (PatchcacheError, OSError) as error:
        return [(PROBE_FILE, error)]


def _check_shard(
    location: Location,
    spec: Spec,
    table: StoreIndex,
    number: int,
    progress: Callable[[int], object] | None,
) -> None:
    file = table.shards[number]
    location.check_size(file)
    shard = open_shard(location.shard_path(file), spec)
    table.check_shard(number, shard)
    mine = table.by_shard[number]
    key = shard_key(spec.fingerprint, table.image_ids[mine], table.source_xxh3[mine])
    if f"{key}.h5" != file.name:
        raise CorruptShardError(
            f"{shard.path}: the images that the index has for it make the name {key}.h5. Ids or "
            f"hashes of image files are wrong. {REMEDY}"
        )
    if progress:
        _check_bytes(shard, file.sha256, progress)


def _check_bytes(shard: Shard, sha256: str, progress: Callable[[int], object]) -> None:
    """Read a shard once, from front to back.

    Raises:
        CorruptShardError: Its bytes are not those that the hashes were taken of.
    """
    digest = hashlib.sha256()
    row_bytes = math.prod(shard.shape[1:]) * np.dtype("<f2").itemsize
    buffer = np.empty(max(1, BLOCK_BYTES // row_bytes) * row_bytes, np.uint8)
    bad = np.zeros(len(shard.image_ids), bool)
    done = 0
    with path_in_errors(shard.path), shard.path.open("rb") as file:
        for block in _blocks(file, buffer, shard.offset):
            digest.update(block.data)
        for block in _blocks(file, buffer, len(bad) * row_bytes):
            digest.update(block.data)
            rows = block.reshape(-1, row_bytes)
            mine = slice(done, done + len(rows))
            bad[mine] = (hash_rows(rows) != shard.row_xxh3[mine]) | ~_finite(rows)
            done += len(rows)
            progress(len(block))
        while rest := file.read(BLOCK_BYTES):
            digest.update(rest)
    if bad.any():
        raise CorruptShardError(
            f"{shard.path}: {int(bad.sum())} rows have another hash than when they were "
            f"written, or values that are not finite: images "
            f"{first_few(shard.image_ids[bad])}. {REMEDY}"
        )
    if digest.hexdigest() != sha256:
        raise CorruptShardError(
            f"{shard.path}: its sha256 is {digest.hexdigest()}, the index has {sha256}. {REMEDY}"
        )


def _blocks(
    file: BinaryIO, buffer: NDArray[np.uint8], num_bytes: int
) -> Iterator[NDArray[np.uint8]]:
    """Read so many bytes through a buffer; each block is overwritten by the next."""
    while num_bytes:
        block = buffer[:num_bytes]
        if file.readinto(block) != len(block):  # type: ignore[attr-defined]
            raise CorruptShardError(f"{file.name}: ended while it was read. Verify it again.")
        num_bytes -= len(block)
        yield block


def _finite(rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell which rows of float16 bytes hold finite numbers only: bool [rows]."""
    is_finite: NDArray[np.bool_] = (rows.view("<u2") & MAGNITUDE).max(axis=1) < INFINITY
    return is_finite
