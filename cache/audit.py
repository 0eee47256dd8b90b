"""Checks every file of a store: `FeatureStore.verify` and the command `verify`.

A shallow check looks at sizes, structure and the index. A deep check also reads each shard once, in
blocks, for the sha256 of the file, the hash of each row, and numbers that are not finite. Threads
check shards side by side, since hashing releases the GIL.
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
from .layout import check_shard
from .plan import shard_key
from .remote.location import Location
from .shard import Shard, hash_rows
from .spec import SPEC_FILE, Spec
from .store_index import INDEX_FILE, PROBE_FILE, StoreIndex, check_own_hash
from .texts import first_few, one_line

BLOCK_BYTES = 1 << 20
"""Bytes read at a time: few enough to stay in a core's cache while they are hashed twice."""

MAGNITUDE, INFINITY = np.uint16(0x7FFF), 0x7C00
"""Bits of a float16: all but the sign, and the smallest magnitude that is not finite."""

Problem = PatchcacheError | OSError

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class VerifyReport:
    """Result of a verification."""

    ok: bool
    problems: list[str] = field(default_factory=list)
    """One line each."""
    bad_files: list[str] = field(default_factory=list)
    """Names of damaged and missing files, which extracting again would mend. A file that could not
    be read or fetched, or is of another version of the format, is not listed."""
    unreadable: list[str] = field(default_factory=list)
    """The problems that are failures of the system, which say nothing about the file."""
    num_images: int = 0
    num_shards: int = 0


def audit(
    location: Location,
    *,
    deep: bool,
    partial: bool = False,
    progress: Progress = lambda done, total: None,
) -> VerifyReport:
    """Check a store.

    Args:
        location: Of the store.
        deep: Whether to read every byte of the shards, too.
        partial: Whether shards may be missing.
        progress: Called with the number of bytes of features that were just checked, and the number
            of bytes to check in all; from several threads.
    """
    checked = SPEC_FILE
    try:
        with location.url_in_errors():
            spec = _check_spec(location)
            checked = INDEX_FILE
            index = _check_index(location, spec)
    except (PatchcacheError, OSError) as error:
        # The shards cannot be judged without both.
        return _report({checked: error})

    total = len(index.image_ids) * spec.patches * spec.width * np.dtype("<f2").itemsize

    def check(number: int) -> Problem | None:
        try:
            with location.url_in_errors():
                if partial and location.size(index.shards[number].name) is None:
                    return None
                shard = check_shard(location, spec, index, number)
                _check_name(shard, spec, index, number)
                if deep:
                    sha256 = index.shards[number].sha256
                    _check_bytes(shard, sha256, lambda done: progress(done, total))
        except (PatchcacheError, OSError) as error:
            return error
        return None

    # More threads than cores: while some hash, others wait for the disk.
    with ThreadPoolExecutor() as threads:
        found = threads.map(check, range(len(index.shards)))
        problems = {file.name: p for file, p in zip(index.shards, found, strict=True) if p}
    try:
        _check_probe(location, index)
    except (PatchcacheError, OSError) as error:
        problems[PROBE_FILE] = error
    return _report(problems, index)


def _report(problems: dict[str, Problem], index: StoreIndex | None = None) -> VerifyReport:
    """Sort the problems of some files, by file name."""
    lines = {name: one_line(problem) for name, problem in problems.items()}
    unreadable = {name for name, p in problems.items() if not isinstance(p, PatchcacheError)}
    unknown = {
        name
        for name, p in problems.items()
        if isinstance(p, FormatVersionError | UnreachableStoreError)
    }
    return VerifyReport(
        ok=not problems,
        problems=list(lines.values()),
        bad_files=[name for name in problems if name not in unreadable | unknown],
        unreadable=[line for name, line in lines.items() if name in unreadable],
        num_images=len(index.image_ids) if index else 0,
        num_shards=len(index.shards) if index else 0,
    )


def _check_spec(location: Location) -> Spec:
    spec = location.read_spec()
    path = location.path(SPEC_FILE)
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


def _check_probe(location: Location, index: StoreIndex) -> None:
    if index.probe_sha256 is not None:
        path = location.path(PROBE_FILE, sha256=index.probe_sha256)
        if sha256_of(path) != index.probe_sha256:
            raise CorruptShardError(f"{path}: its sha256 is not the one in {INDEX_FILE}. {REMEDY}")


def _check_name(shard: Shard, spec: Spec, index: StoreIndex, number: int) -> None:
    """Hold a shard's name, which is a hash, against the images that the index has for it."""
    rows = index.by_shard[number]
    key = shard_key(spec.fingerprint, index.image_ids[rows], index.source_xxh3[rows])
    if f"{key}.h5" != index.shards[number].name:
        raise CorruptShardError(
            f"{shard.path}: the images that the index has for it make the name {key}.h5. Ids or "
            f"hashes of image files are wrong. {REMEDY}"
        )


def _check_bytes(shard: Shard, sha256: str, progress: Callable[[int], object]) -> None:
    """Read a shard once, from front to back.

    Raises:
        CorruptShardError: Its bytes differ from those that were hashed, or are not finite.
    """
    digest = hashlib.sha256()
    row_bytes = math.prod(shard.shape[1:]) * np.dtype("<f2").itemsize
    buffer = np.empty(max(1, BLOCK_BYTES // row_bytes) * row_bytes, np.uint8)
    is_bad = np.zeros(len(shard.image_ids), bool)
    done = 0
    with path_in_errors(shard.path), shard.path.open("rb") as file:
        for block in _blocks(file, buffer, shard.offset):
            digest.update(block.data)
        for block in _blocks(file, buffer, len(is_bad) * row_bytes):
            digest.update(block.data)
            rows = block.reshape(-1, row_bytes)
            place = slice(done, done + len(rows))
            is_bad[place] = (hash_rows(rows) != shard.row_xxh3[place]) | ~_finite(rows)
            done += len(rows)
            progress(len(block))
        while rest := file.read(BLOCK_BYTES):
            digest.update(rest)
    if is_bad.any():
        raise CorruptShardError(
            f"{shard.path}: {int(is_bad.sum())} rows have another hash than when they were "
            f"written, or values that are not finite: images "
            f"{first_few(shard.image_ids[is_bad])}. {REMEDY}"
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
    """Return which rows of float16 bytes hold finite numbers only: bool [rows]."""
    is_finite: NDArray[np.bool_] = (rows.view("<u2") & MAGNITUDE).max(axis=1) < INFINITY
    return is_finite
