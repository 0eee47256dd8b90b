"""Prepares the next data while the model computes: one thread, no worker processes.

A batch of features is one copy out of mapped files, made without the GIL, so a thread is enough. On
the way to a GPU it goes through pinned memory, which can be copied from while the GPU computes.

Letters: B images of a batch, P patches, D width of the vision tower.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureStore, Spec

Item = TypeVar("Item")
Result = TypeVar("Result")

DEPTH = 2
"""Results prepared ahead: one ready, one in the making."""

BATCHES_AHEAD = 8
"""Batches whose rows are requested ahead: at 20 ms a request, 64 rows take two round trips."""

MAX_BATCHES_KNOWN = 1 << 14
"""Most batches of which a store is told at first: about an epoch of a million images."""


class Features(Protocol):
    """A source of image features: a `FeatureStore`, or a stand-in."""

    @property
    def spec(self) -> Spec:
        """Description of the features."""

    def gather(
        self, image_ids: NDArray[np.int64], out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Return the features of some images, in the order asked: float16 [B, P, D]."""


class StoredFeatures(Features, Protocol):
    """Features in shards, for training: a `FeatureStore`, or a view of one."""

    @property
    def root(self) -> str:
        """Folder or URL, for error texts."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""

    def shards_of(self, image_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of each image's shard: int64 [B]."""

    def read_ahead(self, shards: Sequence[int]) -> None:
        """Ask the system to bring whole shards into memory."""

    def prefetch_rows(self, image_ids: NDArray[np.int64]) -> None:
        """Begin to fetch the features of some images from a server, if they are behind a URL."""


class Prefetcher(Generic[Item, Result]):
    """Iterates over a function's results for some items, computed ahead in a thread."""

    def __init__(self, function: Callable[[Item], Result], items: Iterable[Item]) -> None:
        """Store the arguments; nothing is computed before the first iteration.

        Args:
            function: Called in another thread, for one item at a time, in order. Its exceptions
                are raised in place of the result.
            items: Read a few items ahead.
        """
        self._function, self._items = function, items
        self.last_wait = 0.0
        """Seconds spent waiting for the last result."""
        self.waited = 0.0
        """Seconds spent waiting for all results but the first, which nothing could overlap."""
        self.elapsed = 0.0
        """Seconds since the first result, waiting included."""

    @property
    def wait_share(self) -> float:
        """Share of the time that the consumer waited, from 0 to 1."""
        return self.waited / self.elapsed if self.elapsed else 0.0

    def __iter__(self) -> Iterator[Result]:
        items = iter(self._items)
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
            pending: deque[Future[Result]] = deque()
            started = None
            try:
                pending.extend(thread.submit(self._function, item) for item in islice(items, DEPTH))
                while pending:
                    before = time.perf_counter()
                    result = pending.popleft().result()
                    self.last_wait = time.perf_counter() - before
                    if started is None:
                        started = time.perf_counter()
                    else:
                        self.waited += self.last_wait
                        self.elapsed = time.perf_counter() - started
                    pending.extend(thread.submit(self._function, item) for item in islice(items, 1))
                    yield result
                    self.elapsed = time.perf_counter() - started
            finally:
                for future in pending:
                    future.cancel()


class FeatureBatches:
    """Iterates over the features of batches of images, as tensors on a device."""

    def __init__(
        self,
        store: FeatureStore,
        batches: Sequence[NDArray[np.int64]],
        device: torch.device,
        *,
        read_ahead: int = 0,
    ) -> None:
        """Store the arguments; nothing is read before the first iteration.

        Args:
            store: Holds the features.
            batches: Image ids [B] of each batch.
            device: Of the tensors.
            read_ahead: How many batches before its first use a whole shard is requested. For a
                windowed order: the batches of a window. With 0, rows are read from the disk when
                they are gathered.
        """
        self._store, self._batches, self._device = store, batches, device
        self._read_ahead = read_ahead
        self._prefetcher = self._new_prefetcher()

    def _new_prefetcher(self) -> Prefetcher[int, Tensor]:
        store, batches, device = self._store, self._batches, self._device
        readahead = ShardReadahead(store, batches, self._read_ahead)

        # No reference to `self`: a cycle would keep the store's mappings alive.
        def gather(number: int) -> Tensor:
            readahead.advance_to(number)
            return gather_tensor(store, batches[number], device)

        return Prefetcher(gather, range(len(batches)))

    @property
    def wait_share(self) -> float:
        """Share of the time that the last iteration waited for features, from 0 to 1."""
        return self._prefetcher.wait_share

    def __iter__(self) -> Iterator[Tensor]:
        self._prefetcher = self._new_prefetcher()
        for features_BPD in self._prefetcher:
            yield features_BPD.to(self._device, non_blocking=True)


class ShardReadahead:
    """Asks for features some time before they are gathered: for whole shards, or for rows."""

    def __init__(
        self, store: StoredFeatures, batches: Sequence[NDArray[np.int64]], distance: int
    ) -> None:
        """Store the arguments; `distance` is the `read_ahead` of `FeatureBatches`.

        Without a distance, rows are asked for: those of the next batches, and once those of all
        batches, from which a store behind a URL learns of which shards most rows are wanted.
        """
        self._store, self._batches, self._distance = store, batches, distance
        self._last_use: dict[int, float] = {}
        self._next = 0

    def advance_to(self, number: int) -> None:
        """Request what is needed up to `distance` batches after this one; batches come in order."""
        if not self._distance:
            self._request_rows(number)
        while self._distance and self._next < min(number + self._distance, len(self._batches)):
            shards = np.unique(self._store.shards_of(self._batches[self._next])).tolist()
            # A shard unused for so long may have left the page cache.
            evicted = self._next - 2 * self._distance
            self._store.read_ahead(
                [shard for shard in shards if self._last_use.get(shard, -math.inf) < evicted]
            )
            self._last_use |= dict.fromkeys(shards, self._next)
            self._next += 1

    def _request_rows(self, number: int) -> None:
        is_first = not self._next
        while self._next < min(number + BATCHES_AHEAD, len(self._batches)):
            self._store.prefetch_rows(self._batches[self._next])
            self._next += 1
        if is_first and self._batches:
            self._store.prefetch_rows(np.concatenate(self._batches[:MAX_BATCHES_KNOWN]))


def gather_tensor(features: Features, image_ids: NDArray[np.int64], device: torch.device) -> Tensor:
    """Gather features into a tensor in main memory: float16 [B, P, D].

    For a GPU the memory is pinned, so that `.to(device, non_blocking=True)` need not wait.
    """
    if device.type != "cuda":
        # numpy asks for huge pages: 1.2 times as fast here as memory from torch.
        return torch.from_numpy(features.gather(image_ids))
    shape = (len(image_ids), features.spec.patches, features.spec.width)
    features_BPD = torch.empty(shape, dtype=torch.float16, pin_memory=True)
    features.gather(image_ids, features_BPD.numpy())
    return features_BPD
