"""Encodes shards on every device of the settings, one process each.

This process uses the first device; each other device gets a process that loads the vision tower
there. A shared counter hands out whole shards, so that a fast device takes more of them. The bytes
of a shard do not depend on its process.
"""

import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from threading import Thread
from typing import NoReturn

from tqdm import tqdm

from cache.cli.interrupts import without_interrupts
from cache.errors import PatchcacheError
from cache.spec import check_same_spec
from pipeline.encoding.encode import Job, ShardEncoder
from pipeline.encoding.encoder import Encoder, load_encoder, resolve_devices
from pipeline.encoding.probe import check_probe, read_probe
from pipeline.encoding.stats import ExtractionStats
from pipeline.encoding.workers import exit_with_parent
from workspace.errors import StageError

NO_MORE_SHARDS = 2**62
"""A number beyond every shard."""


@dataclass
class SharedCounters:
    """Counters that the processes of a job share."""

    next_shard: "Synchronized[int]"
    images_done: "Synchronized[int]"

    @classmethod
    def create(cls) -> "SharedCounters":
        """Create both counters at 0."""
        context = multiprocessing.get_context("spawn")
        # Starts Python's tracker of semaphores, which SIGHUP would end.
        with without_interrupts():
            return cls(context.Value("q", 0), context.Value("q", 0))

    def claim_shards(self, num_shards: int) -> Iterator[int]:
        """Yield shard numbers, each to one process only."""
        while (number := _fetch_and_add(self.next_shard, 1)) < num_shards:
            yield number

    def stop(self) -> None:
        """Hand out no further shard."""
        self.next_shard.value = NO_MORE_SHARDS


_counters: SharedCounters
"""The counters of the job, in a process of another device."""


def encode_job(job: Job, encoder: Encoder) -> ExtractionStats:
    """Encode the shards of a job on all devices.

    Args:
        job: The shards, and what they are made of.
        encoder: The tower, loaded on the first device.

    Raises:
        StageError: As `ShardEncoder.run`, or a process of another device failed or died.
    """
    devices = [str(device) for device in resolve_devices(job.settings.device)]
    stats = ExtractionStats(devices=len(devices))
    num_images = sum(len(shard.image_ids) for shard in job.shards)
    with tqdm(total=num_images, desc="extract", unit="image", disable=None) as bar:
        if len(devices) == 1:
            ShardEncoder(job, encoder, stats, bar.update).run(range(len(job.shards)))
        else:
            _encode_side_by_side(job, encoder, devices[1:], stats, bar)
    stats.check_failures(job.max_failures, len(job.source.image_ids))
    return stats


def _encode_side_by_side(
    job: Job,
    encoder: Encoder,
    other_devices: list[str],
    stats: ExtractionStats,
    bar: "tqdm[NoReturn]",
) -> None:
    """Encode here and in a process for each other device; add their statistics to `stats`."""
    children_before = multiprocessing.active_children()
    try:
        counters = SharedCounters.create()
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(len(other_devices), context, _init_process, (counters,))
    except OSError as error:
        raise StageError(
            f"encoder.device: the processes of several devices need semaphores, which the system "
            f"keeps in /dev/shm: {error.strerror}. Give it some MB that can be written (docker run "
            f"--shm-size=64m), or name one device."
        ) from None

    def progress(num_images: int) -> None:
        bar.update(_fetch_and_add(counters.images_done, num_images) + num_images - bar.n)

    def stop_after_error(future: "Future[ExtractionStats]") -> None:
        if future.exception():
            counters.stop()

    with pool:
        try:
            with without_interrupts():
                futures = [pool.submit(_encode_elsewhere, job, device) for device in other_devices]
            for future in futures:
                future.add_done_callback(stop_after_error)
            _encode(job, encoder, stats, counters, progress)
            for future in futures:
                stats.add(future.result())
        except BrokenProcessPool:
            raise StageError(
                "extract: the process of a device died. Finished shards are kept; check its "
                "memory, or name fewer devices in encoder.device, and run again."
            ) from None
        except PatchcacheError:
            counters.stop()
            raise
        except BaseException:
            # An interrupt does not wait for the shards of the other devices.
            for process in multiprocessing.active_children():
                if process not in children_before:
                    process.kill()
            raise


def _encode(
    job: Job,
    encoder: Encoder,
    stats: ExtractionStats,
    counters: SharedCounters,
    progress: Callable[[int], object],
) -> None:
    ShardEncoder(job, encoder, stats, progress).run(counters.claim_shards(len(job.shards)))


def _init_process(counters: SharedCounters) -> None:
    global _counters
    _counters = counters
    Thread(target=exit_with_parent, daemon=True).start()


def _encode_elsewhere(job: Job, device: str) -> ExtractionStats:
    """Load the tower on a device, in that device's process, and encode there."""
    encoder = load_encoder(dataclasses.replace(job.settings, device=device))
    check_same_spec(encoder.spec, job.spec, device)
    check_probe(encoder, read_probe(job.probe, job.spec))
    stats = ExtractionStats(devices=len(resolve_devices(job.settings.device)))
    images_done = _counters.images_done
    _encode(job, encoder, stats, _counters, lambda count: _fetch_and_add(images_done, count))
    return stats


def _fetch_and_add(counter: "Synchronized[int]", number: int) -> int:
    """Add to a counter and return its value before."""
    with counter.get_lock():
        before = counter.value
        counter.value += number
    return before
