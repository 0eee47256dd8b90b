"""Reads features back: opens a store and gathers batches.

All shards lie in one range of addresses (`cache.mapping`), each mapped on its first use. A mapping
survives a fork and is shared by threads; it is not pickled, so that a spawned process makes its
own.

Letters: B images asked for, N images of the store, P patches, D width of the vision tower.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .audit import VerifyReport, audit
from .errors import MissingImageError
from .id_lookup import UNKNOWN, IdLookup
from .mapping import FeatureMapping
from .remote.location import Location
from .shard import open_shard
from .spec import MAX_JSON_BYTES, SPEC_FILE, Spec
from .store_index import INDEX_FILE, ShardFile, StoreIndex
from .texts import first_few

INT64_MAX = np.iinfo(np.int64).max


class FeatureStore:
    """Read access to the features of a store."""

    def __init__(self, root: str | Path, *, partial: bool = False) -> None:
        """Open a store and check its spec, its index, and size and structure of its shards.

        Args:
            root: Folder or fsspec URL. Of a URL, each shard is copied here on its first use, and
                held against the index byte for byte; the copies go when the store does.
            partial: Whether shards may be missing. Their images are then not in the store, and
                `missing_shards` names them.

        Raises:
            IncompleteStoreError: A part is missing or not what it should be.
            SpecMismatchError: Spec, index and shards are of different encoders.
            CorruptShardError: The index contradicts itself, or a shard is not what it says.
            UnsafeShardError: A shard is not built as shards are built.
            UnreachableStoreError: The server of a URL does not deliver.
        """
        self.root = str(root)
        self._partial = partial
        self._location = Location(root)
        with self._location.url_in_errors():
            self.spec = Spec.read(self._location.path(SPEC_FILE, MAX_JSON_BYTES))
            table = self._read_table()
        self._shards = table.shards
        is_here = np.array([not partial or self._has(file.name) for file in table.shards], bool)
        self.missing_shards: tuple[str, ...] = tuple(
            table.shards[number].name for number in np.flatnonzero(~is_here)
        )
        """File names of the shards that the index names and the folder lacks."""
        self._sizes = [len(positions) for positions in table.by_shard]
        self._offsets: list[int | None] = [None] * len(self._shards)
        if not self._location.is_remote:
            for number in np.flatnonzero(is_here).tolist():
                self._check(number, table)
        self._space = FeatureMapping(
            self._sizes,
            self.spec.patches,
            self.spec.width,
            offset=max((offset for offset in self._offsets if offset is not None), default=0),
        )
        rows = self._space.starts[table.shard_number] + table.row
        kept = slice(None) if is_here.all() else is_here[table.shard_number]
        image_ids = table.image_ids[kept]
        # It is large, and done with.
        del table
        self._lookup = IdLookup(image_ids, rows[kept])
        self._lookup.image_ids.flags.writeable = False
        self._is_attached = np.zeros(len(self._shards), dtype=bool)
        self._all_attached = False
        self._locks: dict[int, threading.Lock] = {}

    @property
    def fingerprint(self) -> str:
        """Identity of the encoder: sha256 over the spec, in hexadecimal."""
        return self.spec.fingerprint

    @property
    def num_shards(self) -> int:
        """How many shard files the index names."""
        return len(self._shards)

    @property
    def num_bytes(self) -> int:
        """Size of all shard files together, without those that are missing."""
        return sum(s.num_bytes for s in self._shards if s.name not in self.missing_shards)

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """All image ids: int64 [N], ascending, read-only."""
        return self._lookup.image_ids

    def __len__(self) -> int:
        return len(self.image_ids)

    def __repr__(self) -> str:
        shards = f"{self.num_shards - len(self.missing_shards)} shards"
        if self.missing_shards:
            shards += f" ({len(self.missing_shards)} missing)"
        return (
            f"<FeatureStore {self.root!r}: {len(self)} images in {shards}, "
            f"{self.spec.patches} x {self.spec.width} float16, encoder {self.fingerprint[:12]}>"
        )

    def __contains__(self, image_id: object) -> bool:
        if not isinstance(image_id, int | np.integer):
            return False
        # Not as an array of whatever type: against uint64, numpy would compare rounded floats.
        number = int(image_id)
        if not -(2**63) <= number < 2**63:
            return False
        return bool(self._lookup.rows_of(np.array([number]))[0] != UNKNOWN)

    def contains(self, image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return of each image whether it is in the store: bool [B].

        Args:
            image_ids: B ids in any order, within the range of int64.
        """
        is_here: NDArray[np.bool_] = self._lookup.rows_of(_checked_ids(image_ids)) != UNKNOWN
        return is_here

    def gather(
        self,
        image_ids: Sequence[int] | NDArray[np.int64],
        out: NDArray[np.float16] | None = None,
    ) -> NDArray[np.float16]:
        """Read the features of some images, without the GIL while bytes are copied.

        Args:
            image_ids: B ids in any order; repeats are allowed.
            out: Where to put them: float16 [B, P, D], C-contiguous, aligned and writable. Made when
                not given.

        Returns:
            float16 [B, P, D] in the order asked, `out` where given. Patches run row by row from
            the top left, no class token; values are a block's output before the final norm.

        Raises:
            MissingImageError: An id is not in the store; names up to five.
            IncompleteStoreError: A shard is not there any more.
            CorruptShardError: A shard is not what the index says.
            UnreachableStoreError: The server of a URL does not deliver a shard.
            ValueError: Ids that are no integers, or `out` of another shape, type or layout.
        """
        rows = self._rows_of(image_ids)
        shape = (len(rows), self.spec.patches, self.spec.width)
        if out is None:
            out = np.empty(shape, dtype=np.float16)
        elif out.shape != shape or out.dtype != np.float16 or not out.flags.carray:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, wanted float16 {shape}, C-contiguous, aligned "
                f"and writable"
            )
        if not self._all_attached:
            self._attach(self._shard_numbers(rows))
        # All rows are in range: "clip" keeps numpy from gathering into a buffer first.
        np.take(self._space.rows, rows, axis=0, out=out, mode="clip")
        return out

    def shards_of(self, image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of the shard in which each image lies: int64 [B].

        Raises:
            MissingImageError: An id is not in the store.
        """
        return self._shard_numbers(self._rows_of(image_ids))

    def read_ahead(self, shards: Sequence[int]) -> None:
        """Ask the system to bring whole shards into memory; does not wait for a local disk.

        Args:
            shards: Numbers, as `shards_of` gives them. A remote store copies those shards now.
        """
        self._attach(np.asarray(shards, dtype=np.int64))
        for number in shards:
            self._space.read_ahead(number, self._sizes[number])

    def verify(self, deep: bool = True) -> VerifyReport:
        """Check every file of the store against the index, as `cache.audit.audit` does.

        Args:
            deep: Also re-hash every file and every row, and look for values that are not finite.
                Without it, sizes and structure.
        """
        return audit(self._location, deep=deep, partial=self._partial)

    def _rows_of(self, image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.integer]:
        """Return where each image lies in `FeatureMapping.rows`."""
        ids = _checked_ids(image_ids)
        rows = self._lookup.rows_of(ids)
        if rows.min(initial=0) == UNKNOWN:
            raise MissingImageError(self._missing_text(ids[rows == UNKNOWN], len(ids)))
        return rows

    def _missing_text(self, ids: NDArray[np.int64], num_asked: int) -> str:
        remedy = "Index and extract them first."
        if self.missing_shards:
            table = self._read_table()
            shards = table.shard_number[np.isin(table.image_ids, ids)]
            lacking = ", ".join(table.shards[number].name for number in np.unique(shards))
            remedy = f"Get the shards that are not here: {lacking}." if lacking else remedy
        return (
            f"{self.root}: {len(ids)} of {num_asked} images asked for are not among its "
            f"{len(self)}{self._range()}: {first_few(np.unique(ids))}. {remedy}"
        )

    def _range(self) -> str:
        ids = self.image_ids
        return f" (ids {ids[0]} to {ids[-1]})" if len(ids) else ""

    def _shard_numbers(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.searchsorted(self._space.starts, rows, side="right") - 1

    def _attach(self, numbers: NDArray[np.int64]) -> None:
        """Map the shards that were not used yet in this process."""
        wanted = numbers[~self._is_attached[numbers]]
        if not len(wanted):
            return
        # One lock a process: after a fork, nobody is left to release the parent's.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            for number in np.unique(wanted).tolist():
                if not self._is_attached[number]:
                    self._attach_one(number)
            self._all_attached = bool(self._is_attached.all())

    def _attach_one(self, number: int) -> None:
        file = self._shards[number]
        offset = self._offsets[number]
        if offset is None:
            offset = self._check(number, self._read_table())
        self._space.attach(
            number,
            self._location.shard_path(file),
            num_bytes=file.num_bytes,
            offset=offset,
            rows=self._sizes[number],
        )
        self._is_attached[number] = True

    def _check(self, number: int, table: StoreIndex) -> int:
        """Hold a shard against the index; return, and remember, where its features start."""
        file = self._shards[number]
        self._location.check_size(file)
        with self._location.url_in_errors():
            shard = open_shard(self._location.shard_path(file), self.spec)
            table.check_shard(number, shard)
        self._offsets[number] = shard.offset
        return shard.offset

    def _read_table(self) -> StoreIndex:
        return StoreIndex.read(self._location.path(INDEX_FILE), self.spec, self._check_file)

    def _check_file(self, file: ShardFile) -> None:
        """Hold a shard's file against the index, before any row of the index is believed."""
        if not (self._partial or self._location.is_remote):
            # Refuses one that is not there: its size bounds nothing.
            self._location.path(file.name)
        self._location.check_size(file)

    def _has(self, name: str) -> bool:
        return self._location.size(name) is not None

    def __getstate__(self) -> dict[str, Any]:
        # A process that receives it reads spec and index again, instead of a copy of the index.
        # By its whole path: that process may work in another folder.
        return {"root": self._location.address, "partial": self._partial}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FeatureStore.__init__(self, **state)


def _checked_ids(image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    ids = np.asarray(image_ids)
    # numpy would quietly cut off fractions, and take a mask for the ids 0 and 1.
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"image_ids is {ids.dtype} {ids.shape}, wanted integers in one dimension")
    if ids.dtype.kind == "u" and ids.max(initial=0) > INT64_MAX:
        # Cut to int64, it would be another image.
        raise MissingImageError(f"{ids.max()} is no id of any image: ids are int64.")
    return ids.astype(np.int64, copy=False)
