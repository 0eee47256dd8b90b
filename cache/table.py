"""`index.parquet` of a store: one row an image, and what each shard file must be.

Read with bounds on everything that later becomes a path, an offset or a size.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache.errors import IncompleteStoreError
from cache.files import replacing

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


@dataclass(frozen=True)
class ShardFile:
    """What the index says of one shard file."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreTable:
    """The rows of a store in order of image id; all arrays have length N."""

    fingerprint: str
    shards: tuple[ShardFile, ...]
    """In order of name; `shard_number` counts in it."""
    image_ids: NDArray[np.int64]
    shard_number: NDArray[np.int32]
    row: NDArray[np.int32]
    row_xxh3: NDArray[np.uint64]
    source_xxh3: NDArray[np.uint64]

    def write(self, path: Path) -> None:
        """Write the table, whole or not at all. Equal tables give equal bytes."""
        files = {s.name: {"bytes": s.num_bytes, "sha256": s.sha256} for s in self.shards}
        names = np.array([s.name for s in self.shards], dtype=object)
        table = pa.table(
            [self.image_ids, names[self.shard_number], self.row, self.row_xxh3, self.source_xxh3],
            schema=SCHEMA.with_metadata(
                {"fingerprint": self.fingerprint, "shards": json.dumps(files, sort_keys=True)}
            ),
        )
        with replacing(path) as temporary:
            pq.write_table(table, temporary)

    @classmethod
    def read(cls, path: Path) -> "StoreTable":
        """Read and check a table.

        Raises:
            IncompleteStoreError: Missing, unreadable, or not such a table.
        """
        try:
            table = pq.read_table(path, read_dictionary=["shard"], memory_map=False)
        except FileNotFoundError:
            raise IncompleteStoreError(
                f"{path}: missing, so {path.parent} is not a finished store. "
                f"Run the extract stage, or `dvc pull`."
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise _bad(path, f"not a parquet file ({error})") from None
        return cls._from_arrow(table, path)

    @classmethod
    def _from_arrow(cls, table: pa.Table, path: Path) -> "StoreTable":
        if table.schema.names != SCHEMA.names or any(
            not pa.types.is_dictionary(found.type)
            if wanted.name == "shard"
            else found.type != wanted.type
            for found, wanted in zip(table.schema, SCHEMA, strict=True)
        ):
            raise _bad(path, f"its columns are {table.schema.names}, wanted {SCHEMA.names}")
        if any(column.null_count for column in table.columns):
            raise _bad(path, "it has nulls")
        fingerprint, shards = _read_metadata(table.schema.metadata or {}, path)
        column = table["shard"].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = column.unify_dictionaries().chunk(0)
        names = column.dictionary.to_pylist()
        numbers = {shard.name: number for number, shard in enumerate(shards)}
        if not set(names) <= numbers.keys():
            raise _bad(path, "it names a shard without size and hash")
        to_number = np.array([numbers[name] for name in names], dtype=np.int32)
        image_ids = table["image_id"].to_numpy()
        if np.any(np.diff(image_ids) <= 0):
            raise _bad(path, "its image ids do not ascend")
        return cls(
            fingerprint,
            shards,
            image_ids,
            to_number[column.indices.to_numpy()] if names else np.empty(0, np.int32),
            table["row"].to_numpy(),
            table["row_xxh3"].to_numpy(),
            table["source_xxh3"].to_numpy(),
        )


def _read_metadata(metadata: dict[bytes, bytes], path: Path) -> tuple[str, tuple[ShardFile, ...]]:
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
    return fingerprint, shards


def _bad(path: Path, detail: str) -> IncompleteStoreError:
    return IncompleteStoreError(f"{path}: {detail}. Fetch the store again, or run extract.")
