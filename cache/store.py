"""Reads features back: opens a store, gathers batches, verifies files.

Each shard is memory-mapped on first use. A mapping survives a fork and is shared by threads;
it is not pickled, so that a spawned process makes its own.

Letters: B images asked for, P patches, D width of the vision tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from cache.errors import (
    CacheError,
    CorruptShardError,
    IncompleteStoreError,
    MissingImageError,
    SpecMismatchError,
)
from cache.files import sha256_of
from cache.shard import Shard, hash_rows, open_shard
from cache.spec import Spec
from cache.table import StoreTable

NAMED_IDS = 5
"""How many ids an error names."""


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found."""

    ok: bool
    problems: list[str] = field(default_factory=list)
    bad_shards: list[str] = field(default_factory=list)
    """File names of the shards that have a problem."""


class FeatureStore:
    """Read access to the features of a store."""

    def __init__(self, root: str | Path, *, check_sizes: bool = True) -> None:
        """Open a store and check its spec, its index and the sizes of its shards.

        Args:
            root: Folder or fsspec URL. Of a URL, each file is copied here on first use.
            check_sizes: Whether a shard that is missing or of another size is an error already
                now; `verify` finds it in any case.

        Raises:
            IncompleteStoreError: A part is missing or not what it should be.
            SpecMismatchError: Spec and index are of different encoders.
            CorruptShardError: A shard's size is not the one in the index.
        """
        self.root = str(root)
        self._check_sizes = check_sizes
        spec_path = self._local("spec.json")
        if not spec_path.is_file():
            raise IncompleteStoreError(
                f"{spec_path}: missing, so {root} is not a store. Run the extract stage, "
                f"or `dvc pull`."
            )
        self.spec = Spec.from_json(spec_path.read_bytes(), str(spec_path))
        self._table = StoreTable.read(self._local("index.parquet"))
        if self._table.fingerprint != self.fingerprint:
            raise SpecMismatchError(
                f"{root}: index.parquet is of the encoder {self._table.fingerprint!r}, spec.json "
                f"of {self.fingerprint!r}. Run the extract stage."
            )
        self._is_remote = "://" in self.root
        if check_sizes and not self._is_remote:
            for number in range(len(self._table.shards)):
                self._check_size(number)
        self._maps: list[NDArray[np.float16] | None] = [None] * len(self._table.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the encoder: sha256 over the spec, in hexadecimal."""
        return self.spec.fingerprint

    @property
    def num_shards(self) -> int:
        """How many shard files the store has."""
        return len(self._table.shards)

    @property
    def num_bytes(self) -> int:
        """Size of all shard files together."""
        return sum(shard.num_bytes for shard in self._table.shards)

    @property
    def image_ids(self) -> NDArray[np.int64]:
        """All image ids: int64 [N], ascending."""
        return self._table.image_ids

    def __len__(self) -> int:
        return len(self._table.image_ids)

    def __contains__(self, image_id: object) -> bool:
        if not isinstance(image_id, int | np.integer):
            return False
        try:
            # As int64: against uint64 or a larger int, numpy would compare rounded floats.
            wanted = np.int64(int(image_id))
        except OverflowError:
            return False
        position = int(np.searchsorted(self.image_ids, wanted))
        return position < len(self) and bool(self.image_ids[position] == wanted)

    def gather(
        self,
        image_ids: Sequence[int] | NDArray[np.int64],
        out: NDArray[np.float16] | None = None,
    ) -> NDArray[np.float16]:
        """Read the features of some images.

        Args:
            image_ids: B ids in any order; repeats are allowed.
            out: Where to put them: float16 [B, P, D], C-contiguous. Made when not given.

        Returns:
            float16 [B, P, D] in the order asked, `out` where given. Patches run row by row from
            the top left, no class token; values are a block's output before the final norm.

        Raises:
            MissingImageError: An id is not in the store; names up to five.
            CorruptShardError: A shard is not what the index says.
            ValueError: Ids that are no integers, or `out` of another shape, type or layout.
        """
        positions = self._positions(_checked_ids(image_ids))
        shape = (len(positions), self.spec.patches, self.spec.width)
        if out is None:
            out = np.empty(shape, dtype=np.float16)
        elif out.shape != shape or out.dtype != np.float16 or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype} {out.shape}, wanted float16 {shape}, C-contiguous"
            )
        shard_numbers, rows = self._table.shard_number[positions], self._table.row[positions]
        for slot, (number, row) in enumerate(zip(shard_numbers, rows, strict=True)):
            out[slot] = self._map(number)[row]
        return out

    def verify(self, deep: bool = True) -> VerifyReport:
        """Check every shard against the index.

        Args:
            deep: Also re-hash every file and every row, and look for values that are not finite.
                Without it, sizes and structure.
        """
        problems: list[str] = []
        bad_shards: list[str] = []
        for number, file in enumerate(self._table.shards):
            try:
                self._verify_shard(number, deep)
            except CacheError as error:
                problems.append(str(error))
                bad_shards.append(file.name)
        return VerifyReport(not problems, problems, bad_shards)

    def _verify_shard(self, number: int, deep: bool) -> None:
        shard = self._open(number)
        if not deep:
            return
        found = sha256_of(shard.path)
        if found != self._table.shards[number].sha256:
            raise CorruptShardError(
                f"{shard.path}: sha256 is {found}, the index has "
                f"{self._table.shards[number].sha256}. Fetch it again."
            )
        check_rows(shard)

    def _positions(self, image_ids: NDArray[np.int64]) -> NDArray[np.intp]:
        positions = np.searchsorted(self.image_ids, image_ids)
        known = positions < len(self)
        known[known] = self.image_ids[positions[known]] == image_ids[known]
        if not known.all():
            missing = image_ids[~known]
            names = ", ".join(map(str, missing[:NAMED_IDS]))
            raise MissingImageError(
                f"{self.root}: {len(missing)} of {len(image_ids)} images asked for are not among "
                f"its {len(self)}: {names}{', ...' if len(missing) > NAMED_IDS else ''}. "
                f"Index and extract them first."
            )
        return positions

    def _map(self, number: int) -> NDArray[np.float16]:
        mapped = self._maps[number]
        if mapped is None:
            # Two threads may both map a shard: h5py lets one at a time into HDF5, and a second
            # mapping does no harm. A lock of our own could be held by no one after a fork.
            mapped = self._maps[number] = self._open(number).map()
        return mapped

    def _open(self, number: int) -> Shard:
        """Check a shard against the index and open it."""
        self._check_size(number)
        shard = open_shard(self._local(self._table.shards[number].name), self.spec)
        mine = self._table.shard_number == number
        order = np.argsort(self._table.row[mine])
        if not (
            np.array_equal(self._table.row[mine][order], np.arange(len(order)))
            and np.array_equal(self.image_ids[mine][order], shard.image_ids)
            and np.array_equal(self._table.row_xxh3[mine][order], shard.row_xxh3)
        ):
            raise CorruptShardError(
                f"{shard.path}: its image ids or row hashes are not those in index.parquet. "
                f"Fetch both again, or run the extract stage."
            )
        return shard

    def _check_size(self, number: int) -> None:
        file = self._table.shards[number]
        path = self._local(file.name)
        if not path.is_file():
            raise IncompleteStoreError(
                f"{path}: missing, but index.parquet names it. Run `dvc pull`, or extract."
            )
        if path.stat().st_size != file.num_bytes:
            raise CorruptShardError(
                f"{path}: has {path.stat().st_size} bytes, the index says {file.num_bytes}. "
                f"Fetch it again, or run the extract stage."
            )

    def _local(self, name: str) -> Path:
        if "://" not in self.root:
            return Path(self.root) / name
        try:
            return Path(fsspec.open_local(f"simplecache::{self.root.rstrip('/')}/{name}"))
        except FileNotFoundError:
            raise IncompleteStoreError(f"{self.root}: has no {name}. Push it again.") from None

    def __getstate__(self) -> dict[str, object]:
        # A process that receives it reads spec and index again, instead of a copy of the index.
        return {"root": self.root, "check_sizes": self._check_sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FeatureStore.__init__(self, **state)


def _checked_ids(image_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    ids = np.asarray(image_ids)
    # numpy would quietly cut off fractions, and take a mask for the ids 0 and 1.
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"image_ids is {ids.dtype} {ids.shape}, wanted integers in one dimension")
    return ids.astype(np.int64)


def check_rows(shard: Shard) -> None:
    """Read every feature of a shard and hold it against the shard's own hashes.

    Raises:
        CorruptShardError: A row's hash differs, or a value is not finite; names the images.
    """
    features_NPD = shard.map()
    wrong = hash_rows(features_NPD) != shard.row_xxh3
    if not wrong.any():
        # A sum is not finite when a value is not; float32 holds 65504 * 2**100.
        with np.errstate(invalid="ignore"):
            wrong = ~np.isfinite(features_NPD.sum(axis=(1, 2), dtype=np.float32))
    if wrong.any():
        ids = ", ".join(map(str, shard.image_ids[wrong][:NAMED_IDS]))
        raise CorruptShardError(
            f"{shard.path}: {int(wrong.sum())} rows have another hash than when they were "
            f"written, or values that are not finite: images {ids}. Fetch it again, or extract."
        )
