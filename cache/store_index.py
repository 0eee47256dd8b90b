"""`index.parquet` of a store: one row for each image, and size and hash of each shard file.

Everything that later becomes a path, an offset or a size is checked while it is read. The file
carries its own sha256, so that a flipped bit is found wherever it is.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from .errors import REMEDY, CorruptShardError, IncompleteStoreError, SpecMismatchError
from .files.atomic import path_in_errors, write_bytes
from .files.parquet import MAX_FOOTER_BYTES, open_parquet, values_of
from .shard import Shard
from .spec import Spec

INDEX_FILE = "index.parquet"

PROBE_FILE = "probe.safetensors"
"""Features of known pictures, with which an encoder is compared before it adds to a store."""

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("shard", pa.string()),
        ("row", pa.int32()),
        ("row_xxh3", pa.uint64()),
        ("source_xxh3", pa.uint64()),
    ]
)

SHARD_NAME = re.compile(r"[0-9a-f]{16}\.h5")

ARRAY_TYPES = {
    "image_ids": np.int64,
    "shard_number": np.int32,
    "row": np.int32,
    "row_xxh3": np.uint64,
    "source_xxh3": np.uint64,
}
"""Types of the arrays of a `StoreIndex`."""

READ_ROWS = 1 << 16
"""Rows of a row group, and rows that are read at a time."""

READ_BYTES = 1 << 18
"""Bytes of the file that are hashed at a time."""

MIN_TAIL_BYTES = 1 << 16
"""Bytes at the end in which the own hash is looked for, if the footer says that it is shorter."""

OWN_HASH = b"file_sha256"
"""Metadata key of the file's own hash, which is computed with `BLANK` in its place."""

BLANK = b"0" * 64

FOREIGN_KEYS = frozenset({b"fingerprint", b"shards", b"probe_sha256", b"ARROW:schema", b"pandas"})
"""Metadata keys of an index that another program wrote, without its own hash."""


@dataclass(frozen=True)
class ShardFile:
    """What the index says of one shard file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreIndex:
    """The rows of a store in order of image id; all arrays have length N."""

    fingerprint: str
    shards: tuple[ShardFile, ...]
    """In order of name."""
    image_ids: NDArray[np.int64]
    shard_number: NDArray[np.int32]
    """Position in `shards`."""
    row: NDArray[np.int32]
    row_xxh3: NDArray[np.uint64]
    source_xxh3: NDArray[np.uint64]
    probe_sha256: str | None = None
    """Of the encoder's probe, if the store has one."""

    def write(self, path: Path) -> None:
        """Write the index, whole or not at all. Equal indexes give equal bytes."""
        files = {s.name: {"bytes": s.num_bytes, "sha256": s.sha256} for s in self.shards}
        names = np.array([s.name for s in self.shards], dtype=object)
        columns = [
            self.image_ids,
            names[self.shard_number],
            self.row,
            self.row_xxh3,
            self.source_xxh3,
        ]
        metadata = {
            b"fingerprint": self.fingerprint,
            b"shards": json.dumps(files, sort_keys=True),
            OWN_HASH: BLANK,
        }
        if self.probe_sha256 is not None:
            metadata[b"probe_sha256"] = self.probe_sha256
        # In memory first: Arrow does not report every error of a disk, `write_bytes` does.
        buffer = pa.BufferOutputStream()
        # The Arrow schema would repeat the metadata, and with it the hash.
        with pq.ParquetWriter(
            buffer, SCHEMA, store_schema=False, write_page_checksum=True
        ) as writer:
            writer.write_table(pa.table(columns, schema=SCHEMA), row_group_size=READ_ROWS)
            writer.add_key_value_metadata(metadata)
        blank = buffer.getvalue().to_pybytes()
        place = _place_of_hash(blank)
        digest = hashlib.sha256(blank).hexdigest().encode()
        view = memoryview(blank)
        write_bytes(path, view[:place], digest, view[place + len(BLANK) :])

    @cached_property
    def by_shard(self) -> list[NDArray[np.int64]]:
        """For each shard, the positions of its images in order of row; -1 for a missing row."""
        stops = np.cumsum(np.bincount(self.shard_number, minlength=len(self.shards)))
        places = np.concatenate([[0], stops[:-1]])[self.shard_number]
        places += self.row
        # Scattered, not sorted: half the time and memory for a million rows.
        order = np.full(len(self.row), -1)
        order[np.clip(places, 0, max(0, len(order) - 1), out=places)] = np.arange(len(order))
        return np.split(order, stops[:-1])

    def check_shard(self, number: int, shard: Shard) -> None:
        """Hold image ids and row hashes of an opened shard against the index.

        Raises:
            CorruptShardError: They differ.
        """
        positions = self.by_shard[number]
        if not (
            np.array_equal(self.image_ids[positions], shard.image_ids)
            and np.array_equal(self.row_xxh3[positions], shard.row_xxh3)
        ):
            raise CorruptShardError(
                f"{shard.path}: its image ids or row hashes are not those in {INDEX_FILE}. {REMEDY}"
            )

    @classmethod
    def read(
        cls,
        path: Path,
        spec: Spec,
        check_files: Callable[[Sequence[ShardFile]], None] = lambda files: None,
    ) -> "StoreIndex":
        """Read and check an index.

        Args:
            path: Of the file.
            spec: Of the store.
            check_files: Refuses a shard file of another size than the index says. Called before any
                row is read, since the sizes bound the number of rows.

        Raises:
            IncompleteStoreError: Missing, unreadable, or without the columns of an index.
            SpecMismatchError: Of another encoder.
            CorruptShardError: Its rows contradict each other, or the sizes of the shards.
        """

        def refuse(detail: str) -> IncompleteStoreError:
            return _bad(path, f"not a parquet file of these columns ({detail})")

        # As a dictionary, each name is in memory once and not a million times.
        with open_parquet(path, SCHEMA, refuse, read_dictionary=["shard"]) as file:
            fingerprint, shards, probe_sha256 = _read_header(file, path, spec)
            check_files(shards)
            arrays = _read_arrays(file, shards, path)
        # Arrow keeps freed memory for its next use.
        pa.default_memory_pool().release_unused()
        index = cls(fingerprint, shards, probe_sha256=probe_sha256, **arrays)
        _check_rows(index, path)
        return index


def check_own_hash(path: Path, where: str | None = None) -> None:
    """Hold the bytes of an index against the hash that they carry.

    The format does not ask for the hash: an index that another program wrote may lack it.

    Args:
        path: Of the file.
        where: Name of the file in the error; the path when not given.

    Raises:
        CorruptShardError: The bytes are not those that were written.
    """
    with path_in_errors(path), path.open("rb") as file:
        # Read and not mapped: a failing disk under a map kills the process.
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        footer_bytes = int.from_bytes(file.read(4), "little")
        start = max(0, size - 8 - min(max(footer_bytes, MIN_TAIL_BYTES), MAX_FOOTER_BYTES))
        file.seek(start)
        tail = file.read()
        place = _place_of_hash(tail)
        if place < 0 and tail.endswith(b"PAR1"):
            return
        hashed = hashlib.sha256()
        file.seek(0)
        while data := file.read(min(READ_BYTES, start - file.tell())):
            hashed.update(data)
    stated, after = tail[place : place + len(BLANK)], tail[place + len(BLANK) :]
    hashed.update(tail[:place] + BLANK + after)
    digest = hashed.hexdigest().encode()
    if stated != digest:
        raise CorruptShardError(
            f"{where or path}: its sha256 is {digest.decode()}, the one it carries "
            f"{stated.decode(errors='replace')!r}. {REMEDY}"
        )


def _place_of_hash(data: bytes) -> int:
    """Return where the file's own hash starts; -1 if there is none."""
    place = data.rfind(OWN_HASH)
    # Thrift writes a key, then a field header and a length below 128, then the value.
    return place if place < 0 else place + len(OWN_HASH) + 2


def _read_header(
    file: pq.ParquetFile, path: Path, spec: Spec
) -> tuple[str, tuple[ShardFile, ...], str | None]:
    """Check everything that the footer says, before any row is read."""
    if file.schema_arrow.names != SCHEMA.names:
        raise _bad(path, f"its columns are {file.schema_arrow.names}, wanted {SCHEMA.names}")
    metadata = file.metadata.metadata or {}
    if OWN_HASH not in metadata and metadata.keys() - FOREIGN_KEYS:
        # The unknown key may be a damaged `OWN_HASH`.
        raise _bad(path, f"its metadata have the unknown keys {metadata.keys() - FOREIGN_KEYS}")
    try:
        fingerprint = metadata[b"fingerprint"].decode()
        files = json.loads(metadata[b"shards"])
        shards = tuple(
            ShardFile(name, int(file["bytes"]), str(file["sha256"]))
            for name, file in sorted(files.items())
        )
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise _bad(path, "its metadata lack the fingerprint or the shards") from None
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard.name):
            raise _bad(path, f"it names a shard {shard.name!r}")
    if fingerprint != spec.fingerprint:
        raise SpecMismatchError(
            f"{path}: is of the encoder {fingerprint!r}, spec.json of {spec.fingerprint!r}. "
            f"Run the extract stage."
        )
    row_bytes = spec.patches * spec.width * np.dtype("<f2").itemsize
    if file.metadata.num_rows * row_bytes > sum(shard.num_bytes for shard in shards):
        raise CorruptShardError(
            f"{path}: has {file.metadata.num_rows} rows of {row_bytes} bytes of features, more "
            f"than the shards that it names can hold. {REMEDY}"
        )
    probe = metadata.get(b"probe_sha256")
    return fingerprint, shards, None if probe is None else probe.decode()


def _read_arrays(
    file: pq.ParquetFile, shards: tuple[ShardFile, ...], path: Path
) -> dict[str, NDArray[Any]]:
    """Read all rows in batches, so that memory never holds much more than the result."""
    numbers = {shard.name: number for number, shard in enumerate(shards)}
    num_rows = file.metadata.num_rows
    if num_rows < 0:
        raise _bad(path, f"its footer says that it has {num_rows} rows")
    arrays: dict[str, NDArray[Any]] = {
        name: np.empty(num_rows, dtype) for name, dtype in ARRAY_TYPES.items()
    }
    start = 0
    for batch in file.iter_batches(READ_ROWS, use_threads=False):
        if any(column.null_count for column in batch.columns):
            raise _bad(path, "it has nulls")
        rows = slice(start, start + batch.num_rows)
        if rows.stop > num_rows:
            raise _bad(path, f"it has more than the {num_rows} rows that its footer says")
        names = batch["shard"].dictionary.to_pylist()
        if not set(names) <= numbers.keys():
            raise _bad(path, "it names a shard without size and hash")
        to_number = np.array([numbers[name] for name in names], dtype=np.int32)
        arrays["shard_number"][rows] = to_number[values_of(batch["shard"].indices)]
        arrays["image_ids"][rows] = values_of(batch["image_id"])
        for name in ("row", "row_xxh3", "source_xxh3"):
            arrays[name][rows] = values_of(batch[name])
        start = rows.stop
    if start < num_rows:
        raise _bad(path, f"it has {start} of the {num_rows} rows that its footer says")
    return arrays


def _check_rows(index: StoreIndex, path: Path) -> None:
    """Refuse an image in two rows, and rows of a shard that are not 0, 1, 2, ..."""
    # Not `np.diff`: differences of 2^63 and more overflow.
    is_wrong = index.image_ids[1:] <= index.image_ids[:-1]
    if np.any(is_wrong):
        first = int(np.argmax(is_wrong))
        names = [index.shards[n].name for n in index.shard_number[first : first + 2]]
        raise CorruptShardError(
            f"{path}: image ids must ascend, but {index.image_ids[first + 1]} follows "
            f"{index.image_ids[first]} (shards {names[0]} and {names[1]}). {REMEDY}"
        )
    for number, positions in enumerate(index.by_shard):
        if np.any(positions < 0) or not np.array_equal(
            index.row[positions], np.arange(len(positions))
        ):
            raise CorruptShardError(
                f"{path}: the {len(positions)} rows of {index.shards[number].name} are not "
                f"0, 1, 2, ... {REMEDY}"
            )


def _bad(path: Path, detail: str) -> IncompleteStoreError:
    return IncompleteStoreError(f"{path}: {detail}. {REMEDY}")
