"""Chooses what encodes the shards of a job: this process alone, or Ray."""

import os

from tqdm import tqdm

from cache.errors import SettingsError
from pipeline.encoding.batches import Job
from pipeline.encoding.encode import ShardEncoder
from pipeline.encoding.encoder import Encoder, resolve_devices
from pipeline.encoding.stats import ExtractionStats


def encode_job(job: Job, encoder: Encoder) -> ExtractionStats:
    """Encode the shards of a job with the engine that it names.

    Args:
        job: The shards, and what they are made of.
        encoder: The tower on the first device of this machine, for the local engine.

    Raises:
        SettingsError: The engine cannot use these devices, or Ray is not installed.
        StageError: As `ShardEncoder.run` raises it, or the cluster failed.
    """
    address = cluster_address()
    runs_here = is_local(job, address)
    stats = ExtractionStats()
    num_images = sum(len(shard.image_ids) for shard in job.shards)
    with tqdm(total=num_images, desc="extract", unit="image", disable=None) as bar:
        if runs_here:
            stats.decoders = max(1, job.workers)
            ShardEncoder(job, encoder, stats, bar.update).run()
        else:
            # Needs the package ray.
            from pipeline.cluster.engine import encode_on_cluster

            encode_on_cluster(job, address, stats, bar.update)
    stats.check_failures(job.max_failures, len(job.source.image_ids))
    return stats


def cluster_address() -> str | None:
    """Return the address of the cluster that RAY_ADDRESS names; None if there is none.

    "local" is Ray's own word for no cluster.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def is_local(job: Job, address: str | None) -> bool:
    """Return whether this process encodes a job alone.

    Raises:
        SettingsError: The local engine was given several devices by name, or a device is missing.
    """
    engine, device = job.engine, job.settings.device
    if engine == "ray" or (engine == "auto" and address):
        return False
    num_devices = len(resolve_devices(device))
    if engine == "auto" or num_devices == 1:
        return num_devices == 1
    if device != "auto":
        raise SettingsError(
            f"extract.engine is local, which uses one device, and encoder.device names "
            f"{num_devices}: {device}. Name one of them, or set extract.engine: auto."
        )
    print(f"extract: uses the first of {num_devices} GPUs (extract.engine: local)", flush=True)
    return True
