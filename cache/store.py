"""Reads features: opens a store and gathers batches.

The features of all shards are mapped into one address range (`mapping`), each shard on its first
use. Forked processes and threads share the mappings. A pickled store opens itself again. Rows of a
store behind a URL are fetched before they are read (`remote.shards`).

Letters: B images asked for, N images of the store, P patches, D width of the vision tower.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial as partially
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .audit import VerifyReport, audit
from .errors import MissingImageError
from .id_lookup import UNKNOWN, IdLookup
from .layout import StoreLayout
from .mapping import FeatureMapping
from .remote.cache_folder import CacheFolder
from .remote.shards import RemoteShards
from .texts import first_few, without_passwords

INT64_MAX = np.iinfo(np.int64).max


class FeatureStore:
    """Read access to the features of a store."""

    def __init__(
        self,
        root: str | Path,
        *,
        partial: bool = False,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        """Open a store and check its spec, its index, and size and structure of its shards.

        Args:
            root: Folder or fsspec URL. Rows of a URL are fetched when they are needed, or with
                their whole shard, held against the index, and kept in a folder of this machine.
            partial: Whether shards may be missing. Their images are then not in the store, and
                `missing_shards` names them.
            cache_dir: Keeps what was fetched, for all stores and processes; by default the
                environment's PATCHCACHE_CACHE_DIR, or `~/.cache/patchcache`.
            cache_bytes: Limit of that folder, beyond which the least recently used shards go, but
                for those that one `gather` reads, in any process; by default the environment's
                PATCHCACHE_CACHE_GB, or half of the free disk.

        Raises:
            SettingsError: A URL of an unknown kind, or an impossible cache.
            IncompleteStoreError: A part is missing or is not what it should be.
            SpecMismatchError: Spec, index and shards are of different encoders.
            CorruptShardError: The index contradicts itself, or a shard is not what it says.
            UnsafeShardError: A shard has links, filters, attributes or another layout.
            UnreachableStoreError: The server of a URL fails or refuses access.
        """
        self.root = str(root)
        self._layout, index = StoreLayout.open(root, partial=partial)
        self.spec = self._layout.spec
        self.missing_shards = self._layout.missing
        """File names of the shards that the index names and the folder lacks."""
        self._mapping = FeatureMapping(
            self._layout.num_rows,
            self.spec.patches,
            self.spec.width,
            offset=self._layout.usual_offset,
        )
        is_here = self._layout.is_here[index.shard_number]
        rows = self._mapping.starts[index.shard_number] + index.row
        self._lookup = IdLookup(index.image_ids[is_here], rows[is_here])
        self._cache_arguments: dict[str, Any] = {}
        self._remote: RemoteShards | None = None
        if self._layout.location.is_remote:
            cache = CacheFolder.open(cache_dir, cache_bytes)
            self._cache_arguments = {"cache_dir": cache.path, "cache_bytes": cache.limit}
            row_xxh3 = np.zeros(len(self._mapping.rows), np.uint64)
            row_xxh3[rows] = index.row_xxh3
            self._remote = RemoteShards(
                self._layout.location,
                self.spec,
                self._layout.shards,
                self._layout.num_rows,
                self._mapping,
                row_xxh3,
                cache,
            )
            weakref.finalize(self, self._remote.close)
        self._is_mapped = np.zeros(self.num_shards, dtype=bool)
        self._all_mapped = False
        self._locks: dict[int, threading.Lock] = {}

    @property
    def fingerprint(self) -> str:
        """Identity of the encoder: sha256 over the spec, in hexadecimal."""
        return self.spec.fingerprint

    @property
    def origin(self) -> str | None:
        """URL that the shards of a folder are read from; None if they are in the folder."""
        return self._layout.location.origin

    @property
    def num_shards(self) -> int:
        """Number of shard files that the index names."""
        return len(self._layout.shards)

    @property
    def is_remote(self) -> bool:
        """Whether the store is behind a URL."""
        return self._layout.location.is_remote

    @property
    def num_bytes(self) -> int:
        """Size of all shard files together, without missing ones."""
        return sum(s.num_bytes for s in self._layout.shards if s.name not in self.missing_shards)

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
            f"<FeatureStore {without_passwords(self.root)!r}: {len(self)} images in {shards}, "
            f"{self.spec.patches} x {self.spec.width} float16, encoder {self.fingerprint[:12]}>"
        )

    def __contains__(self, image_id: object) -> bool:
        # Compared as a Python integer: numpy would round a uint64 to a float.
        if not isinstance(image_id, int | np.integer) or not -(2**63) <= int(image_id) < 2**63:
            return False
        return bool(self.contains([int(image_id)])[0])

    def contains(self, image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return whether each image is in the store: bool [B].

        Args:
            image_ids: B ids in any order, within the range of int64.
        """
        is_known: NDArray[np.bool_] = self._lookup.rows_of(_checked_ids(image_ids)) != UNKNOWN
        return is_known

    def gather(
        self,
        image_ids: Sequence[int] | NDArray[np.int64],
        out: NDArray[np.float16] | None = None,
    ) -> NDArray[np.float16]:
        """Read the features of some images; the GIL is released while bytes are copied.

        Args:
            image_ids: B ids in any order; repeats are allowed.
            out: Array to fill: float16 [B, P, D], C-contiguous, aligned and writable. Allocated
                when not given.

        Returns:
            float16 [B, P, D] in the order of `image_ids`; `out` where given. Patches run row by row
            from the top left, without the class token. Values are a block's output before the final
            norm.

        Raises:
            MissingImageError: An id is not in the store; names up to five.
            IncompleteStoreError: A shard has been deleted.
            CorruptShardError: A shard is not what the index says.
            UnreachableStoreError: The server of a URL fails or refuses access.
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
        with contextlib.nullcontext() if self._all_mapped else self._readable(rows):
            self._mapping.request(rows)
            # All rows are in range: "clip" keeps numpy from gathering into a buffer first.
            np.take(self._mapping.rows, rows, axis=0, out=out, mode="clip")
        return out

    def shards_of(self, image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of each image's shard: int64 [B].

        Raises:
            MissingImageError: An id is not in the store.
        """
        return self._shard_numbers(self._rows_of(image_ids))

    def read_ahead(self, shards: Sequence[int]) -> None:
        """Ask the system to bring whole shards into memory; does not wait for a local disk.

        Args:
            shards: Numbers from `shards_of`. Shards of a URL are fetched in the background, in
                this order; a `gather` waits for its own rows only.
        """
        if self._remote:
            self._remote.read_ahead(shards)
            return
        self._map(np.asarray(shards, dtype=np.int64))
        for number in shards:
            self._mapping.read_ahead(number, self._layout.num_rows[number])

    def prefetch_rows(self, image_ids: Sequence[int] | NDArray[np.int64]) -> None:
        """Begin to fetch the features of some images of a URL; does not wait.

        If the store fits the folder for copies, shards of which most rows are wanted are fetched
        whole, after single rows; if not, more rows than the folder holds are not fetched at once.
        Does nothing for a store on this machine: its system reads ahead. An error of the server is
        that of the `gather` which needs the rows.

        Args:
            image_ids: B ids in any order; repeats are allowed.

        Raises:
            MissingImageError: An id is not in the store.
        """
        if self._remote and not self._all_mapped:
            self._remote.prefetch(self._rows_of(image_ids))

    def verify(self, deep: bool = True) -> VerifyReport:
        """Check every file of the store against the index.

        Args:
            deep: Also re-hash every file and every row, and look for values that are not finite.
                Without it, sizes and structure.
        """
        return audit(self._layout.location, deep=deep, partial=self._layout.partial)

    def _rows_of(self, image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.integer]:
        """Return each image's row in `FeatureMapping.rows`: [B]."""
        ids = _checked_ids(image_ids)
        rows = self._lookup.rows_of(ids)
        if rows.min(initial=0) == UNKNOWN:
            raise MissingImageError(self._missing_text(ids[rows == UNKNOWN], len(ids)))
        return rows

    def _missing_text(self, ids: NDArray[np.int64], num_asked: int) -> str:
        remedy = "Index and extract them first."
        if self.missing_shards:
            index = self._layout.read_index()
            shards = np.unique(index.shard_number[np.isin(index.image_ids, ids)])
            if len(shards):
                names = ", ".join(index.shards[number].name for number in shards)
                remedy = f"Get the shards that are not here: {names}."
        known = f" (ids {self.image_ids[0]} to {self.image_ids[-1]})" if len(self) else ""
        return (
            f"{self.root}: {len(ids)} of {num_asked} images asked for are not among its "
            f"{len(self)}{known}: {first_few(np.unique(ids))}. {remedy}"
        )

    def _shard_numbers(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.searchsorted(self._mapping.starts, rows, side="right") - 1

    @contextlib.contextmanager
    def _readable(self, rows: NDArray[np.integer]) -> Iterator[None]:
        """Keep rows mapped inside the `with` block; remote ones are fetched and checked first."""
        if not self._remote:
            self._map(self._shard_numbers(rows))
            yield
            return
        with self._remote.readable(rows):
            yield
        self._all_mapped = self._remote.all_here

    def _map(self, numbers: NDArray[np.int64]) -> None:
        """Map the shards that this process has not used yet."""
        wanted = numbers[~self._is_mapped[numbers]]
        if not len(wanted):
            return
        # A lock for each process: a lock that is held at a fork stays locked in the child.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            for number in np.unique(wanted).tolist():
                if not self._is_mapped[number]:
                    file = self._layout.shards[number]
                    self._mapping.attach(
                        number,
                        offset=self._layout.offset_of(number),
                        path=self._layout.location.shard_path(file),
                        num_bytes=file.num_bytes,
                        rows=self._layout.num_rows[number],
                    )
                    self._is_mapped[number] = True
            self._all_mapped = bool(self._is_mapped.all())

    def __reduce__(self) -> tuple[Callable[..., "FeatureStore"], tuple[Any, ...]]:
        # By the absolute path: the process that unpickles may work in another folder.
        layout = self._layout
        arguments = self._cache_arguments
        return partially(FeatureStore, partial=layout.partial, **arguments), (
            layout.location.address,
        )


def _checked_ids(image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    ids = np.asarray(image_ids)
    # numpy would silently truncate fractions, and take a mask for the ids 0 and 1.
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"image_ids is {ids.dtype} {ids.shape}, wanted integers in one dimension")
    if ids.dtype.kind == "u" and ids.max(initial=0) > INT64_MAX:
        # Wrapped to int64, it would name another image.
        raise MissingImageError(f"{ids.max()} is no id of any image: ids are int64.")
    return ids.astype(np.int64, copy=False)
