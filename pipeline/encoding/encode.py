"""Decodes images in worker processes ahead of the encoder, and writes shards behind it.

The three run at the same time: worker processes decode whole batches, this thread encodes them (a
GPU works on one batch while the one before comes back from it), one more thread hashes and writes
the shard before. At most two shards are in memory.

Letters: B images of a batch, S side of the input in pixels, P patches, D width of the tower.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from cache.files.atomic import sha256_of_pieces
from cache.plan import PlannedShard
from cache.shard import hash_rows, shard_bytes
from pipeline.encoding.encoder import Encoder, Started
from pipeline.encoding.stats import Tally
from pipeline.encoding.work_folder import finish
from pipeline.encoding.workers import Workers
from pipeline.images.decode import DecodeError, Interpolation, Resize, decode_rgb
from pipeline.images.source import ImageSource

PREFETCH_BATCHES = 2
"""Decoded batches that wait for the encoder, per worker process."""


@dataclass(frozen=True)
class DecodedBatch:
    """Some images of one shard, on their way from a worker process to the encoder."""

    shard_number: int
    start: int
    """Row of the first image in its shard."""
    pixels_BSSC: NDArray[np.uint8]
    """Images that failed are left out."""
    failures: dict[int, str]
    seconds: float


class BatchDecoder:
    """Decodes the n-th batch of some shards; a batch never crosses a shard."""

    def __init__(self, shards: list[PlannedShard], source: ImageSource, encoder: Encoder) -> None:
        spec = encoder.spec
        self._source, self._side = source, spec.image_size
        self._resize = cast(Resize, spec.resize)
        self._interpolation = cast(Interpolation, spec.interpolation)
        self._batches = [
            (number, start, shard.image_ids[start : start + spec.batch_size])
            for number, shard in enumerate(shards)
            for start in range(0, len(shard.image_ids), spec.batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def batches_of(self, taken: Iterable[int]) -> Iterator[int]:
        """Yield the numbers of the batches of some shards, in order."""
        numbers = np.array([shard_number for shard_number, _, _ in self._batches])
        for shard_number in taken:
            yield from np.flatnonzero(numbers == shard_number).tolist()

    def __getitem__(self, number: int) -> DecodedBatch:
        started = time.perf_counter()
        shard_number, start, image_ids = self._batches[number]
        pixels: list[NDArray[np.uint8]] = []
        failures: dict[int, str] = {}
        for image_id in image_ids.tolist():
            data = self._source.read(image_id)
            try:
                pixels.append(decode_rgb(data, self._side, self._resize, self._interpolation))
            except DecodeError as reason:
                failures[image_id] = str(reason)
        stacked = np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8)
        seconds = time.perf_counter() - started
        return DecodedBatch(shard_number, start, stacked, failures, seconds)


def encode_shards(
    shards: list[PlannedShard],
    source: ImageSource,
    encoder: Encoder,
    folder: Path,
    *,
    workers: int,
    max_failures: int,
    tally: Tally,
    taken: Iterable[int] | None = None,
    progress: Callable[[int], object] = lambda num_images: None,
) -> None:
    """Encode some shards into a folder.

    A shard with an image that does not decode is not written: without that image it is another
    shard. Its images are still decoded, so that one pass finds all failures.

    Args:
        shards: What to encode.
        source: Where the images are.
        encoder: The vision tower.
        folder: Each shard appears in it under its own name, whole, as soon as it is done.
        workers: Decoding processes; 0 decodes here.
        max_failures: More failed images than this stop the run.
        tally: Added to.
        taken: Numbers of the shards that this process takes, all of them when not given. It is
            asked for the next one when that is about to be decoded.
        progress: Told how many more images are done with.

    Raises:
        StageError: Too many failures, images that are not the indexed ones, or a worker that died.
    """
    shape = (encoder.spec.patches, encoder.spec.width)
    features_NPD = np.empty((0, *shape), np.float16)
    written: Future[None] | None = None
    decoder = BatchDecoder(shards, source, encoder)
    numbers = decoder.batches_of(range(len(shards)) if taken is None else taken)
    with Workers(decoder.__getitem__, workers) as pool, ThreadPoolExecutor(1) as writer:
        decoded = pool.results(numbers, PREFETCH_BATCHES)
        healthy = _healthy(decoded, tally, max_failures, len(source.image_ids), progress)
        for batch, features_BPD in _encoded(healthy, encoder, tally):
            shard = shards[batch.shard_number]
            if batch.start == 0:
                features_NPD = np.empty((len(shard.image_ids), *shape), np.float16)
            stop = batch.start + len(features_BPD)
            features_NPD[batch.start : stop] = features_BPD
            if stop == len(shard.image_ids):
                if written:
                    written.result()
                written = writer.submit(_write, folder, shard, encoder, features_NPD, tally)
        if written:
            written.result()


def _healthy(
    batches: Iterator[DecodedBatch],
    tally: Tally,
    max_failures: int,
    num_images: int,
    progress: Callable[[int], object],
) -> Iterator[DecodedBatch]:
    """Yield the batches of shards in which no image failed so far; count the failures."""
    broken: set[int] = set()
    for batch in batches:
        tally.seconds["decode"] += batch.seconds
        tally.failures.update(batch.failures)
        tally.check(max_failures, num_images)
        if batch.failures:
            broken.add(batch.shard_number)
        if batch.shard_number not in broken:
            yield batch
        progress(len(batch.pixels_BSSC) + len(batch.failures))


def _encoded(
    batches: Iterator[DecodedBatch], encoder: Encoder, tally: Tally
) -> Iterator[tuple[DecodedBatch, NDArray[np.float16]]]:
    """Yield each batch with its features, after the next one was given to the device."""
    before: tuple[DecodedBatch, Started] | None = None
    for batch in batches:
        with tally.timed("encode"):
            started = encoder.start(torch.from_numpy(batch.pixels_BSSC))
        if before:
            yield before[0], _finished(before[1], encoder, tally)
        before = batch, started
    if before:
        yield before[0], _finished(before[1], encoder, tally)


def _finished(started: Started, encoder: Encoder, tally: Tally) -> NDArray[np.float16]:
    with tally.timed("encode"):
        return encoder.finish(started)


def _write(
    folder: Path,
    shard: PlannedShard,
    encoder: Encoder,
    features_NPD: NDArray[np.float16],
    tally: Tally,
) -> None:
    with tally.timed("hash"):
        row_xxh3 = hash_rows(features_NPD)
    pieces = shard_bytes(encoder.spec, shard.image_ids, features_NPD, row_xxh3)
    with tally.timed("hash"):
        digest = sha256_of_pieces(pieces)
    with tally.timed("write"):
        finish(folder / shard.name, pieces, digest)
    tally.encoded_shards[shard.name] = digest
    tally.images_encoded += len(shard.image_ids)
