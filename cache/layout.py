"""The files of a store: which the index names, which are here, and whether each fits the index.

Reads and checks; `store` maps and gathers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .remote.location import Location
from .remote.threads import GATHER, submit
from .shard import USUAL_OFFSET, Shard, open_shard
from .spec import Spec
from .store_index import INDEX_FILE, ShardFile, StoreIndex


@dataclass(frozen=True)
class StoreLayout:
    """The checked files of a store."""

    location: Location
    spec: Spec
    partial: bool
    """Whether shards may be missing."""
    shards: tuple[ShardFile, ...]
    """In the order in which the index numbers them."""
    num_rows: list[int]
    """Of each shard."""
    is_here: NDArray[np.bool_]
    """Of each shard; all True unless `partial`."""
    _offsets: dict[int, int] = field(default_factory=dict)

    @classmethod
    def open(cls, root: str | Path, *, partial: bool) -> tuple["StoreLayout", StoreIndex]:
        """Check spec and index, and size and structure of the shards that are on this machine.

        Arguments and errors are those of `FeatureStore`. The index is returned beside the layout,
        which does not keep it: it is large.
        """
        location = Location(root)
        with location.url_in_errors():
            spec = location.read_spec()
            index = _read_index(location, spec, partial)
        is_here = [not partial or location.size(file.name) is not None for file in index.shards]
        num_rows = [len(positions) for positions in index.by_shard]
        layout = cls(location, spec, partial, index.shards, num_rows, np.array(is_here, bool))
        if not location.is_remote:
            for number in np.flatnonzero(layout.is_here).tolist():
                layout.offset_of(number, index)
        return layout, index

    @property
    def missing(self) -> tuple[str, ...]:
        """File names of the shards that are not here."""
        return tuple(self.shards[number].name for number in np.flatnonzero(~self.is_here))

    @property
    def usual_offset(self) -> int:
        """The largest offset of features in a checked shard; that of our files if none was."""
        return max(self._offsets.values(), default=USUAL_OFFSET)

    def offset_of(self, number: int, index: StoreIndex | None = None) -> int:
        """Return where a shard's features start, in bytes; the shard is checked at the first call.

        Args:
            number: Of the shard.
            index: Of the store; read again when not given.
        """
        if number not in self._offsets:
            with self.location.url_in_errors():
                shard = check_shard(self.location, self.spec, index or self.read_index(), number)
            self._offsets[number] = shard.offset
        return self._offsets[number]

    def read_index(self) -> StoreIndex:
        """Read the index again."""
        return _read_index(self.location, self.spec, self.partial)


def check_shard(location: Location, spec: Spec, index: StoreIndex, number: int) -> Shard:
    """Hold size, structure, image ids and row hashes of a shard against the index.

    Raises:
        IncompleteStoreError: The shard is missing.
        UnreachableStoreError: The server of a URL does not deliver it.
        CorruptShardError: It is not the shard that the index describes.
        UnsafeShardError: It is not built as shards are built.
        SpecMismatchError: Another encoder wrote it.
    """
    file = index.shards[number]
    location.check_size(file)
    shard = open_shard(location.shard_path(file), spec)
    index.check_shard(number, shard)
    return shard


def _read_index(location: Location, spec: Spec, partial: bool) -> StoreIndex:
    def check_files(files: Sequence[ShardFile]) -> None:
        if location.is_remote:
            # One listing may tell all sizes; of a web server each is asked for, many at once.
            for file in files[:1]:
                location.check_size(file)
            for asked in [submit(GATHER, location.check_size, file) for file in files[1:]]:
                asked.result()
            return
        for file in files:
            if not partial:
                # Refuses a missing shard, whose size would bound nothing.
                location.path(file.name)
            location.check_size(file)

    return StoreIndex.read(location.path(INDEX_FILE), spec, check_files)
