"""Encodes shards on one device: worker processes decode ahead, a thread writes behind.

Worker processes decode whole batches, this thread encodes them (a GPU computes one batch while the
one before is copied back), and one more thread hashes and writes the finished shard. At most two
shards are in memory. `pipeline.cluster` takes the decoded batches from a cluster instead.

Letters: N images of a shard, B images of a batch, S side of the input in pixels, P patches,
D width of the tower.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cache.files.atomic import sha256_of_pieces
from cache.plan import PlannedShard
from cache.shard import hash_rows, shard_bytes
from pipeline.encoding.batches import BatchDecoder, DecodedBatch, Job
from pipeline.encoding.encoder import Encoder, PendingBatch
from pipeline.encoding.stats import ExtractionStats
from pipeline.encoding.work_folder import write_with_hash
from pipeline.encoding.workers import WorkerPool

PREFETCH_BATCHES = 2
"""Decoded batches that wait for the encoder, per worker process."""

Write = Callable[[Path, Sequence[bytes | memoryview], str], object]
"""Takes a file's path, its pieces and their sha256."""


class ShardEncoder:
    """Encodes shards of a job on one device."""

    def __init__(
        self,
        job: Job,
        encoder: Encoder,
        stats: ExtractionStats,
        progress: Callable[[int], object],
        write: Write | None = None,
    ) -> None:
        """Prepare to encode.

        Args:
            job: The job.
            encoder: The vision tower on the device.
            stats: Updated while shards are encoded.
            progress: Called with the number of images of each batch that was decoded.
            write: Takes each finished shard; by default it is written with its hash.
        """
        self._job = job
        self._encoder = encoder
        self._stats = stats
        self._progress = progress
        self._write_file = write or write_with_hash

    def run(self) -> None:
        """Decode, encode and write all shards of the job.

        Raises:
            StageError: Too many failures, images other than the indexed ones, or a dead worker.
        """
        decoder = BatchDecoder(self._job.shards, self._job.source, self._job.spec)
        writing: Future[None] | None = None
        with (
            WorkerPool(decoder.decode, self._job.workers) as pool,
            ThreadPoolExecutor(1) as writer,
        ):
            decoded = pool.results(range(len(decoder)), PREFETCH_BATCHES)
            for shard, features_NPD in self.encoded_shards(decoded):
                if writing:
                    writing.result()
                writing = writer.submit(self.write, shard, features_NPD)
            if writing:
                writing.result()

    def encoded_shards(
        self, decoded: Iterator[DecodedBatch]
    ) -> Iterator[tuple[PlannedShard, NDArray[np.float16]]]:
        """Yield shards of the job with their features, float16 [N, P, D].

        A shard with an image that does not decode is left out: without that image it is another
        shard, with another name. All its images are still decoded, so that one pass finds all
        failures.

        Args:
            decoded: The batches of the shards, in order.

        Raises:
            StageError: As `run` raises it.
        """
        spec = self._encoder.spec
        features_NPD = np.empty((0, spec.patches, spec.width), np.float16)
        for batch, features_BPD in self._encoded(self._without_failed_shards(decoded)):
            shard = self._job.shards[batch.shard_number]
            num_rows = len(shard.image_ids)
            if batch.start == 0:
                features_NPD = np.empty((num_rows, spec.patches, spec.width), np.float16)
            stop = batch.start + len(features_BPD)
            features_NPD[batch.start : stop] = features_BPD
            if stop == num_rows:
                yield shard, features_NPD

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

    def write(self, shard: PlannedShard, features_NPD: NDArray[np.float16]) -> None:
        """Hash and write a shard of `encoded_shards`."""
        stats = self._stats
        with stats.timed("hash"):
            row_xxh3 = hash_rows(features_NPD)
        pieces = shard_bytes(self._encoder.spec, shard.image_ids, features_NPD, row_xxh3)
        with stats.timed("hash"):
            digest = sha256_of_pieces(pieces)
        with stats.timed("write"):
            self._write_file(self._job.folder / shard.name, pieces, digest)
        stats.encoded_shards[shard.name] = digest
        stats.images_encoded += len(shard.image_ids)
