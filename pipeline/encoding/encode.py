"""Encodes shards on one device: worker processes decode ahead, a thread writes behind.

Worker processes decode whole batches, this thread encodes them (a GPU computes one batch while the
one before is copied back), and one more thread hashes and writes the finished shard. At most two
shards are in memory.

Letters: N images of a shard, B images of a batch, S side of the input in pixels, P patches,
D width of the tower.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache.files.atomic import sha256_of_pieces
from cache.plan import PlannedShard
from cache.shard import hash_rows, shard_bytes
from cache.spec import Spec
from pipeline.encoding.encoder import Encoder, PendingBatch
from pipeline.encoding.stats import ExtractionStats
from pipeline.encoding.work_folder import write_with_hash
from pipeline.encoding.workers import WorkerPool
from pipeline.images.decode import DecodeError, decode_for
from pipeline.images.source import ImageSource
from pipeline.settings import EncoderSettings

PREFETCH_BATCHES = 2
"""Decoded batches that wait for the encoder, per worker process."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The input of the encoding processes; pickled for each device."""

    shards: list[PlannedShard]
    source: ImageSource
    settings: EncoderSettings
    spec: Spec
    probe: Path
    """The stored features of eight known pictures, which every device's encoder must reproduce."""
    folder: Path
    """Each shard appears here under its own name, whole, as soon as it is finished."""
    workers: int
    """Decoding processes of all devices together; 0 decodes in the encoding process."""
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

    def __init__(self, shards: list[PlannedShard], source: ImageSource, encoder: Encoder) -> None:
        spec = encoder.spec
        self._source, self._spec = source, spec
        self._batches = [
            (number, start, shard.image_ids[start : start + spec.batch_size])
            for number, shard in enumerate(shards)
            for start in range(0, len(shard.image_ids), spec.batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def batches_of(self, shard_numbers: Iterable[int]) -> Iterator[int]:
        """Yield the numbers of the batches of some shards, in order."""
        shard_of_batch = np.array([shard_number for shard_number, _, _ in self._batches])
        for shard_number in shard_numbers:
            yield from np.flatnonzero(shard_of_batch == shard_number).tolist()

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


class ShardEncoder:
    """Encodes shards of a job on one device."""

    def __init__(
        self,
        job: Job,
        encoder: Encoder,
        stats: ExtractionStats,
        progress: Callable[[int], object],
    ) -> None:
        """Prepare to encode.

        Args:
            job: The job, of which `run` takes some shards or all.
            encoder: The vision tower on the device.
            stats: Updated while shards are encoded; its `devices` share the job's workers.
            progress: Called with the number of images of each batch that was decoded.
        """
        self._job = job
        self._encoder = encoder
        self._stats = stats
        self._progress = progress
        self._decoder = BatchDecoder(job.shards, job.source, encoder)

    def run(self, shard_numbers: Iterable[int]) -> None:
        """Encode shards of the job and write them.

        A shard with an image that does not decode is not written: without that image it is
        another shard, with another name. All its images are still decoded, so that one pass finds
        all failures.

        Args:
            shard_numbers: Positions in the job's shards, read lazily: devices take them from one
                counter, each when the decoding of a shard begins.

        Raises:
            StageError: Too many failures, images other than the indexed ones, or a dead worker.
        """
        spec = self._encoder.spec
        workers = math.ceil(self._job.workers / self._stats.devices)
        features_NPD = np.empty((0, spec.patches, spec.width), np.float16)
        writing: Future[None] | None = None
        with (
            WorkerPool(self._decoder.decode, workers) as pool,
            ThreadPoolExecutor(1) as writer,
        ):
            decoded = pool.results(self._decoder.batches_of(shard_numbers), PREFETCH_BATCHES)
            for batch, features_BPD in self._encoded(self._without_failed_shards(decoded)):
                shard = self._job.shards[batch.shard_number]
                num_rows = len(shard.image_ids)
                if batch.start == 0:
                    features_NPD = np.empty((num_rows, spec.patches, spec.width), np.float16)
                stop = batch.start + len(features_BPD)
                features_NPD[batch.start : stop] = features_BPD
                if stop == num_rows:
                    if writing:
                        writing.result()
                    writing = writer.submit(self._write, shard, features_NPD)
            if writing:
                writing.result()

    def _without_failed_shards(self, batches: Iterator[DecodedBatch]) -> Iterator[DecodedBatch]:
        """Yield the batches of shards without a failure so far; record the failures."""
        failed_shards: set[int] = set()
        for batch in batches:
            self._stats.seconds["decode"] += batch.seconds
            self._stats.failures.update(batch.failures)
            self._stats.check_failures(self._job.max_failures, len(self._job.source.image_ids))
            if batch.failures:
                failed_shards.add(batch.shard_number)
            if batch.shard_number not in failed_shards:
                yield batch
            self._progress(len(batch.pixels_BSSC) + len(batch.failures))

    def _encoded(
        self, batches: Iterator[DecodedBatch]
    ) -> Iterator[tuple[DecodedBatch, NDArray[np.float16]]]:
        """Yield each batch with its features, after submitting the next one to the device."""
        previous: tuple[DecodedBatch, PendingBatch] | None = None
        for batch in batches:
            with self._stats.timed("encode"):
                pending = self._encoder.submit(torch.from_numpy(batch.pixels_BSSC))
            if previous:
                yield previous[0], self._result(previous[1])
            previous = batch, pending
        if previous:
            yield previous[0], self._result(previous[1])

    def _result(self, pending: PendingBatch) -> NDArray[np.float16]:
        with self._stats.timed("encode"):
            return self._encoder.result(pending)

    def _write(self, shard: PlannedShard, features_NPD: NDArray[np.float16]) -> None:
        stats = self._stats
        with stats.timed("hash"):
            row_xxh3 = hash_rows(features_NPD)
        pieces = shard_bytes(self._encoder.spec, shard.image_ids, features_NPD, row_xxh3)
        with stats.timed("hash"):
            digest = sha256_of_pieces(pieces)
        with stats.timed("write"):
            write_with_hash(self._job.folder / shard.name, pieces, digest)
        stats.encoded_shards[shard.name] = digest
        stats.images_encoded += len(shard.image_ids)
