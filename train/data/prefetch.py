"""Has the next data ready while the model computes: one thread, no worker processes.

A batch of features is one copy out of mapped files, made without the GIL, so that a thread is
enough; on the way to a GPU it goes through pinned memory, which can be copied from while the GPU
computes.

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

Asked = TypeVar("Asked")
Made = TypeVar("Made")

DEPTH = 2
"""How many items are made ahead: one ready, one in the making."""


class Features(Protocol):
    """Where the features of images come from: a `FeatureStore`, or what stands in for one."""

    @property
    def spec(self) -> Spec:
        """What they are."""

    def gather(
        self, image_ids: NDArray[np.int64], out: NDArray[np.float16] | None = None
    ) -> NDArray[np.float16]:
        """Return those of some images, in their order: float16 [B, P, D]."""


class Ahead(Generic[Asked, Made]):
    """Iterates over what a function makes of some items, made ahead in a thread."""

    def __init__(self, make: Callable[[Asked], Made], items: Iterable[Asked]) -> None:
        """Remember what to do; nothing is made before the first iteration.

        Args:
            make: Called in another thread, for one item at a time, in their order. What it raises
                is raised where the item would have come.
            items: What it is called with; read a few items ahead.
        """
        self._make, self._items = make, items
        self.last_wait = 0.0
        """Seconds that the last item was waited for."""
        self.waited = 0.0
        """Seconds waited for all items but the first, for which nothing could be done ahead."""
        self.elapsed = 0.0
        """Seconds from the first item on, waiting included."""

    @property
    def wait_share(self) -> float:
        """Share of the time that the consumer waited, from 0 to 1."""
        return self.waited / self.elapsed if self.elapsed else 0.0

    def __iter__(self) -> Iterator[Made]:
        items = iter(self._items)
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
            ahead: deque[Future[Made]] = deque()
            started = None
            try:
                ahead.extend(thread.submit(self._make, item) for item in islice(items, DEPTH))
                while ahead:
                    asked = time.perf_counter()
                    made = ahead.popleft().result()
                    self.last_wait = time.perf_counter() - asked
                    if started is None:
                        started = time.perf_counter()
                    else:
                        self.waited += self.last_wait
                        self.elapsed = time.perf_counter() - started
                    ahead.extend(thread.submit(self._make, item) for item in islice(items, 1))
                    yield made
                    self.elapsed = time.perf_counter() - started
            finally:
                for future in ahead:
                    future.cancel()


class FeatureBatches:
    """Iterates over the features of some batches, as tensors on a device."""

    def __init__(
        self,
        store: FeatureStore,
        batches: Sequence[NDArray[np.int64]],
        device: torch.device,
        *,
        read_ahead: int = 0,
    ) -> None:
        """Remember what to read.

        Args:
            store: Holds the features.
            batches: Image ids [B] of each batch.
            device: Where the tensors go.
            read_ahead: So many batches before its first use a shard is asked for as a whole. For
                a windowed order: as many batches as a window has. With 0, rows are read from the
                disk when they are gathered.
        """
        self._store, self._batches, self._device = store, batches, device
        self._read_ahead = read_ahead
        self._ahead = self._new()

    def _new(self) -> Ahead[int, Tensor]:
        store, batches, device = self._store, self._batches, self._device
        shards = ShardsAhead(store, batches, self._read_ahead)

        # Without `self`, which holds it: a cycle would keep the store's mappings alive.
        def make(number: int) -> Tensor:
            shards.before(number)
            return gather_tensor(store, batches[number], device)

        return Ahead(make, range(len(batches)))

    @property
    def wait_share(self) -> float:
        """Share of the time that the last iteration waited for features, from 0 to 1."""
        return self._ahead.wait_share

    def __iter__(self) -> Iterator[Tensor]:
        self._ahead = self._new()
        for features_BPD in self._ahead:
            yield features_BPD.to(self._device, non_blocking=True)


class ShardsAhead:
    """Asks the system to read whole shards some time before their rows are gathered."""

    def __init__(
        self, store: FeatureStore, batches: Sequence[NDArray[np.int64]], distance: int
    ) -> None:
        """Remember the batches; see `FeatureBatches` for what they are."""
        self._store, self._batches, self._distance = store, batches, distance
        self._last_seen: dict[int, float] = {}
        self._looked = 0

    def before(self, number: int) -> None:
        """Look as far ahead of this batch as was asked for; batches come in their order."""
        while self._distance and self._looked < min(number + self._distance, len(self._batches)):
            numbers = np.unique(self._store.shards_of(self._batches[self._looked])).tolist()
            # One that was not seen for so long may have left the memory.
            forgotten = self._looked - 2 * self._distance
            self._store.read_ahead(
                [n for n in numbers if self._last_seen.get(n, -math.inf) < forgotten]
            )
            self._last_seen |= dict.fromkeys(numbers, self._looked)
            self._looked += 1


def gather_tensor(features: Features, image_ids: NDArray[np.int64], device: torch.device) -> Tensor:
    """Gather features into a tensor of the main memory: float16 [B, P, D].

    It is pinned where the device is a GPU, so that `.to(device, non_blocking=True)` need not wait.
    """
    if device.type != "cuda":
        # Memory from numpy, which asks for huge pages: 1.2 times as fast as memory from torch here.
        return torch.from_numpy(features.gather(image_ids))
    shape = (len(image_ids), features.spec.patches, features.spec.width)
    features_BPD = torch.empty(shape, dtype=torch.float16, pin_memory=True)
    features.gather(image_ids, features_BPD.numpy())
    return features_BPD
