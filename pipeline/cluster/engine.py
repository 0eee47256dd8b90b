"""Encodes the shards of a job on a Ray cluster: hands out whole shards, and survives losses.

Each encoder has up to `SHARDS_IN_FLIGHT` shards: one that is written, one that is encoded, one
that is decoded ahead. The shards of an encoder that died go to the others, or to one that is
started in its place; nodes that join are used.
"""

import contextlib
import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache.errors import PatchcacheError, SettingsError
from cache.files.atomic import write_text
from cache.plan import PlannedShard
from cache.texts import one_line
from pipeline.cluster.connection import connected
from pipeline.cluster.decoding import ClusterJob
from pipeline.encoding.batches import Job
from pipeline.encoding.encoder import resolve_devices
from pipeline.encoding.probe import read_probe
from pipeline.encoding.stats import ExtractionStats
from pipeline.encoding.work_folder import write_with_hash
from workspace.errors import StageError

SHARDS_IN_FLIGHT = 3
"""Shards that an encoder has at one time."""

MAX_TRIES = 3
"""How often a shard is begun, and an encoder started in one slot, until the stage gives up."""

POLL_SECONDS = 1.0
"""Seconds between two looks at the list of nodes."""

HINT_SECONDS = 60.0
"""Seconds without a loaded encoder after which the stage prints a hint."""


@dataclass(frozen=True)
class EncoderSlot:
    """Where an encoder runs."""

    node_id: str
    address: str
    device: str
    """In torch's words."""
    number: int
    """Among the encoders of its node."""
    num_gpus: int
    """GPUs that Ray reserves for the encoder, and shows to no other process."""

    def __str__(self) -> str:
        return f"the encoder on node {self.address} ({self.device})"


def encode_on_cluster(
    job: Job,
    address: str | None,
    stats: ExtractionStats,
    progress: Callable[[int], object],
) -> None:
    """Encode the shards of a job.

    Args:
        job: The job.
        address: Of the cluster; None starts Ray on this machine, with the devices of the settings.
        stats: Updated as shards are finished.
        progress: Called with the number of images of each shard.

    Raises:
        SettingsError: Ray is not installed, or the cluster has no such device.
        StageError: As `ShardEncoder.run`; or the cluster cannot be reached, an encoder does not
            reproduce the features of this machine, or a shard was lost too often.
    """
    with cluster_run(job, address, stats, progress) as run:
        run.encode_all()


@contextlib.contextmanager
def cluster_run(
    job: Job,
    address: str | None,
    stats: ExtractionStats,
    progress: Callable[[int], object],
) -> "Iterator[ClusterRun]":
    """Hold a cluster and the encoders of a job there; arguments and errors as `encode_on_cluster`.

    Yields:
        The run, which has not begun.
    """
    num_cpus = max(1, job.workers)
    with connected(address, num_cpus, _store_bytes(job, num_cpus)), _marked(job) as cluster_job:
        slots = cluster_slots(job.settings.device) if address else local_slots(job)
        with contextlib.closing(ClusterRun(cluster_job, slots, stats, progress)) as run:
            yield run


def _store_bytes(job: Job, num_cpus: int) -> int:
    """Return the memory of twice the decoded batches that are in flight on this machine."""
    spec = job.spec
    batches = SHARDS_IN_FLIGHT * (num_cpus + 2 * len(job.settings.device.split(",")))
    return 2 * batches * spec.batch_size * spec.image_size**2 * 3


@contextlib.contextmanager
def _marked(job: Job) -> Iterator[ClusterJob]:
    """Write a file by which other processes recognise the folder of a job."""
    content = secrets.token_hex(16)
    marker = job.folder.absolute() / f".{content[:8]}.shared.partial"
    write_text(marker, content)
    try:
        yield ClusterJob(job, Path.cwd(), marker, content)
    finally:
        marker.unlink(missing_ok=True)


def local_slots(job: Job) -> Callable[[], list[EncoderSlot]]:
    """Return a function of the slots on this machine: one for each device of the settings."""
    import ray

    node_id = ray.get_runtime_context().get_node_id()
    devices = [str(device) for device in resolve_devices(job.settings.device)]
    slots = [EncoderSlot(node_id, "of this machine", d, n, 0) for n, d in enumerate(devices)]
    return lambda: slots


def cluster_slots(device: str) -> Callable[[], list[EncoderSlot]]:
    """Return a function of the slots that the cluster has at the moment.

    Args:
        device: "auto" means every GPU, or CPUs if the cluster has no GPU now.

    Raises:
        SettingsError: The setting names devices of one machine.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise SettingsError(
            f"encoder.device is {device}, which names devices of one machine; for the cluster of "
            f"RAY_ADDRESS, wanted auto, cpu or cuda."
        )
    if device == "auto":
        device = "cuda" if any(_count(node, "GPU") for node in _nodes()) else "cpu"
    return lambda: [
        EncoderSlot(
            node["NodeID"], node["NodeManagerAddress"], device, number, int(device == "cuda")
        )
        for node in _nodes()
        for number in range(_num_encoders(node, device))
    ]


def _num_encoders(node: dict[str, Any], device: str) -> int:
    """Return how many encoders a node takes: each on CPUs has the threads of torch here."""
    if device == "cuda":
        return _count(node, "GPU")
    num_cpus = _count(node, "CPU")
    return max(1, num_cpus // torch.get_num_threads()) if num_cpus else 0


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _num_cpus() -> int:
    return sum(_count(node, "CPU") for node in _nodes())


def _count(node: dict[str, Any], resource: str) -> int:
    return int(node["Resources"].get(resource, 0))


@dataclass
class _Encoder:
    """An encoder, and what it was asked to do."""

    slot: EncoderSlot
    actor: Any
    loading: Any
    """Reference of the first call; None once it is done."""
    shards: dict[Any, int] = field(default_factory=dict)
    """Shard number by the reference of the call."""


class ClusterRun:
    """The state of a job on the cluster."""

    def __init__(
        self,
        cluster_job: ClusterJob,
        slots: Callable[[], list[EncoderSlot]],
        stats: ExtractionStats,
        progress: Callable[[int], object],
    ) -> None:
        import ray

        self._job, self._slots = cluster_job.job, slots
        self._stats, self._progress = stats, progress
        self._probe = read_probe(self._job.probe, self._job.spec)
        self._holder = [ray.put(cluster_job)]
        self._waiting: deque[int] = deque()
        self._tries: Counter[int | EncoderSlot] = Counter()
        self._encoders: dict[EncoderSlot, _Encoder] = {}

    def close(self) -> None:
        """End all encoders."""
        for encoder in list(self._encoders.values()):
            self._drop(encoder)

    def encode_all(self) -> None:
        """Encode every shard of the job; again, if it was done: the encoders stay until `close`."""
        import ray

        self._waiting.extend(range(len(self._job.shards)))
        patience = time.monotonic() + HINT_SECONDS
        while self._waiting or any(encoder.shards for encoder in self._encoders.values()):
            self._start_encoders()
            self._hand_out()
            calls = {
                reference: encoder
                for encoder in self._encoders.values()
                for reference in (encoder.loading, *encoder.shards)
                if reference is not None
            }
            for reference in ray.wait(list(calls), timeout=POLL_SECONDS)[0]:
                self._finish(calls[reference], reference)
                patience = math.inf
            if time.monotonic() > patience:
                print("extract: no encoder has started yet; is the cluster in use?", flush=True)
                patience = math.inf

    def _start_encoders(self) -> None:
        """Start an encoder in every slot that lacks one, but not more than there are shards."""
        slots = self._slots()
        if not slots:
            raise StageError(
                f"encoder.device is {self._job.settings.device}, and the Ray cluster has no node "
                f"with such a device, or has it no more. Finished shards are kept; start a node, "
                f"and run again."
            )
        useful = len(self._waiting) + sum(bool(e.shards) for e in self._encoders.values())
        for slot in slots:
            if slot not in self._encoders and len(self._encoders) < useful:
                self._encoders[slot] = self._start(slot)
        self._stats.devices = max(self._stats.devices, len(self._encoders))
        self._stats.decoders = max(self._stats.decoders, _num_cpus())

    def _start(self, slot: EncoderSlot) -> _Encoder:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from pipeline.cluster.encoder_actor import EncoderActor

        # The CPUs are left to the tasks that decode.
        actor_class = ray.remote(
            num_cpus=0,
            num_gpus=slot.num_gpus,
            max_concurrency=SHARDS_IN_FLIGHT,
            scheduling_strategy=NodeAffinitySchedulingStrategy(slot.node_id, soft=False),
        )(EncoderActor)
        actor = actor_class.remote()
        num_threads = torch.get_num_threads()
        loading = actor.load.remote(self._holder, slot.device, num_threads, self._probe)
        return _Encoder(slot, actor, loading)

    def _hand_out(self) -> None:
        """Give shards to the loaded encoders, first to those that have fewest."""
        loaded = [encoder for encoder in self._encoders.values() if encoder.loading is None]
        # With the batches of the next shard, two for each CPU.
        window = 1 + math.ceil(_num_cpus() / len(self._encoders))
        while self._waiting and loaded:
            encoder = min(loaded, key=lambda encoder: len(encoder.shards))
            if len(encoder.shards) == SHARDS_IN_FLIGHT:
                break
            shard_number = self._waiting.popleft()
            encoder.shards[encoder.actor.encode.remote(shard_number, window)] = shard_number

    def _finish(self, encoder: _Encoder, reference: Any) -> None:
        """Take the result of a call; put the shards of an encoder that died back."""
        try:
            result = _result(reference)
        except _Lost as lost:
            self._lose(encoder, lost)
            return
        if reference == encoder.loading:
            encoder.loading = None
        elif (shard_number := encoder.shards.pop(reference, None)) is not None:
            self._finish_shard(self._job.shards[shard_number], *result)

    def _finish_shard(
        self, shard: PlannedShard, stats: ExtractionStats, pieces: list[NDArray[np.uint8]]
    ) -> None:
        if pieces:
            digest = stats.encoded_shards[shard.name]
            write_with_hash(self._job.folder / shard.name, [p.data for p in pieces], digest)
        self._stats.add(stats)
        self._stats.check_failures(self._job.max_failures, len(self._job.source.image_ids))
        self._progress(len(shard.image_ids))

    def _lose(self, encoder: _Encoder, lost: "_Lost") -> None:
        if self._encoders.get(encoder.slot) is not encoder:
            # Another of its calls said so.
            return
        self._drop(encoder)
        self._waiting.extendleft(sorted(encoder.shards.values(), reverse=True))
        begun: list[int | EncoderSlot] = [*encoder.shards.values()] or [encoder.slot]
        self._tries.update(begun)
        if max(self._tries[what] for what in begun) == MAX_TRIES:
            names = [self._job.shards[number].name for number in encoder.shards.values()]
            raise StageError(
                f"extract: {encoder.slot} died{' with ' if names else ''}{', '.join(names)}, "
                f"after {MAX_TRIES} tries: {lost}. Finished shards are kept; check the memory of "
                f"that node, and run again."
            )

    def _drop(self, encoder: _Encoder) -> None:
        """End what is left of an encoder."""
        import ray
        from ray.exceptions import RayError

        del self._encoders[encoder.slot]
        with contextlib.suppress(RayError):
            ray.kill(encoder.actor)


class _Lost(Exception):
    """The process or the node of a call died."""


def _result(reference: Any) -> Any:
    """Return the result of a call of an encoder.

    Raises:
        _Lost: The process or the node died, or the result was lost with it.
        PatchcacheError, OSError: What the call raised.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PatchcacheError | OSError):
            raise error.cause from None
        raise
    except RayError as error:
        raise _Lost(one_line(str(error).partition("\n")[0]).rstrip(".")) from None
