"""What is encoded, and its batches of decoded images; torch is not needed to decode.

Letters: B images of a batch, S side of the input in pixels.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cache.plan import PlannedShard
from cache.spec import Spec
from pipeline.images.decode import DecodeError, decode_for
from pipeline.images.source import ImageSource
from pipeline.settings import EncoderSettings, Engine


@dataclass(frozen=True, kw_only=True)
class Job:
    """The input of the encoding processes; an engine of several pickles it."""

    shards: list[PlannedShard]
    source: ImageSource
    settings: EncoderSettings
    spec: Spec
    probe: Path
    """The stored features of eight known pictures, which every encoder of a cluster reproduces."""
    folder: Path
    """Each shard appears here under its own name, whole, as soon as it is finished."""
    workers: int
    """Decoding processes on this machine; 0 decodes in the encoding process."""
    engine: Engine
    max_failures: int
    """The run stops when more images than this fail to decode."""


@dataclass(frozen=True)
class DecodedBatch:
    """Decoded images of one shard, on their way from a worker process to the encoder."""

    shard_number: int
    start: int
    """Row of the first image in its shard."""
    pixels_BSSC: NDArray[np.uint8]
    """Without the images that failed."""
    failures: dict[int, str]
    """Why an image could not be decoded, by image id."""
    seconds: float


class BatchDecoder:
    """Decodes the n-th batch of some shards; a batch never crosses a shard."""

    def __init__(self, shards: list[PlannedShard], source: ImageSource, spec: Spec) -> None:
        self._source, self._spec = source, spec
        self._batches: list[tuple[int, int, NDArray[np.int64]]] = []
        self._of_shards: list[range] = []
        for number, shard in enumerate(shards):
            first = len(self._batches)
            self._batches += [
                (number, start, shard.image_ids[start : start + spec.batch_size])
                for start in range(0, len(shard.image_ids), spec.batch_size)
            ]
            self._of_shards.append(range(first, len(self._batches)))

    def __len__(self) -> int:
        return len(self._batches)

    def batches_of(self, shard_number: int) -> range:
        """Return the numbers of the batches of a shard, in order."""
        return self._of_shards[shard_number]

    def decode(self, number: int) -> DecodedBatch:
        """Read and decode the images of a batch."""
        started = time.perf_counter()
        shard_number, start, image_ids = self._batches[number]
        pixels: list[NDArray[np.uint8]] = []
        failures: dict[int, str] = {}
        for image_id in image_ids.tolist():
            data = self._source.read(image_id)
            try:
                pixels.append(decode_for(data, self._spec))
            except DecodeError as reason:
                failures[image_id] = str(reason)
        stacked = np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8)
        seconds = time.perf_counter() - started
        return DecodedBatch(shard_number, start, stacked, failures, seconds)
