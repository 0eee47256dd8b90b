"""The process of an encoder in the cluster: one for each GPU or, without any, for some CPUs."""

import atexit
import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import PatchcacheError
from cache.spec import check_same_spec
from pipeline.cluster.decoding import ClusterJob, decode_ahead, node_name
from pipeline.encoding.batches import BatchDecoder
from pipeline.encoding.encode import ShardEncoder
from pipeline.encoding.encoder import Encoder, load_encoder
from pipeline.encoding.probe import Probe, check_probe
from pipeline.encoding.stats import ExtractionStats
from workspace.errors import StageError

Pieces = list[NDArray[np.uint8]]
"""The bytes of a shard, in order."""


class EncoderActor:
    """Encodes whole shards; Ray calls it from several threads.

    While a shard is encoded, the one before is written and the next one is decoded. One thread
    alone runs torch.
    """

    def load(self, holder: "list[Any]", device: str, num_threads: int, probe: Probe) -> None:
        """Load the vision tower; the first call.

        Args:
            holder: Holds the reference of the `ClusterJob`.
            device: In torch's words.
            num_threads: Of torch: their number decides the last bits of a feature.
            probe: Features that the tower must reproduce.

        Raises:
            StageError: The node cannot encode for this store; names the node.
        """
        import ray

        # Threads of torch can keep a process of Ray from its end.
        atexit.register(os._exit, 0)
        self._holder = holder
        self._cluster_job: ClusterJob = ray.get(holder[0])
        self._cluster_job.enter()
        job = self._cluster_job.job
        self._batches = BatchDecoder(job.shards, job.source, job.spec)
        self._shares_folder = _shares_folder(self._cluster_job)
        self._torch = ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(num_threads,)
        )
        self._encoder = self._torch.submit(self._load_encoder, device, probe).result()

    def _load_encoder(self, device: str, probe: Probe) -> Encoder:
        job = self._cluster_job.job
        try:
            encoder = load_encoder(dataclasses.replace(job.settings, device=device))
            check_same_spec(encoder.spec, job.spec, device)
            check_probe(encoder, probe)
        except PatchcacheError as error:
            raise StageError(f"{node_name()}: {error}") from None
        return encoder

    def encode(self, shard_number: int, window: int) -> tuple[ExtractionStats, Pieces]:
        """Encode a shard and write it where the driver will find it.

        Args:
            shard_number: Its position in the job.
            window: Batches that are decoded ahead.

        Returns:
            What happened; and the shard's bytes, if this node does not share the driver's folder.

        Raises:
            StageError: As `ShardEncoder.run` raises it.
        """
        pieces: Pieces = []

        def keep(path: Path, found: Sequence[bytes | memoryview], digest: str) -> None:
            pieces.extend(np.frombuffer(piece, np.uint8) for piece in found if len(piece))

        stats = ExtractionStats()
        encoder = ShardEncoder(
            self._cluster_job.job,
            self._encoder,
            stats,
            progress=lambda count: None,
            write=None if self._shares_folder else keep,
        )
        decoded = decode_ahead(self._holder, self._batches.batches_of(shard_number), window)
        encoded = self._torch.submit(lambda: list(encoder.encoded_shards(decoded))).result()
        for shard, features_NPD in encoded:
            encoder.write(shard, features_NPD)
        return stats, pieces


def _shares_folder(cluster_job: ClusterJob) -> bool:
    """Return whether this process writes where the driver does, under the same relative path."""
    job = cluster_job.job
    try:
        content = (job.folder / cluster_job.marker.name).read_text()
    except OSError:
        return False
    return content == cluster_job.marker_content
