"""Encodes shards on every device of the settings: one process a device, each takes whole shards.

The first device is this process's; every other one has a process of its own, which loads the
vision tower there. A counter that all share hands out the next shard, so that a fast device takes
more of them; no shard depends on who made it.
"""

import contextlib
import dataclasses
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_longlong
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized, synchronized
from pathlib import Path
from threading import RLock, Thread

from tqdm import tqdm

from cache.cli.interrupts import without_interrupts
from cache.errors import PatchcacheError
from cache.plan import PlannedShard
from cache.spec import Spec, check_same_spec
from pipeline.encoding.encode import encode_shards
from pipeline.encoding.encoder import Encoder, load_encoder, pick_devices
from pipeline.encoding.probe import check_probe, read_probe
from pipeline.encoding.stats import Tally
from pipeline.encoding.workers import end_with_parent
from pipeline.images.source import ImageSource
from pipeline.settings import EncoderSettings
from workspace.errors import StageError

LAST = 2**62
"""A number that no shard has."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What there is to encode; a process that starts is sent this."""

    shards: list[PlannedShard]
    source: ImageSource
    settings: EncoderSettings
    spec: Spec
    probe: Path
    """Which every device must reproduce."""
    folder: Path
    workers: int
    """Decoding processes, of all devices together."""
    max_failures: int


@dataclass
class Shared:
    """What the processes of one job count together."""

    next_shard: "Synchronized[int]"
    images_done: "Synchronized[int]"

    @classmethod
    def among(cls, num_processes: int) -> "Shared":
        """Begin to count. One process alone needs nothing of the system's for it.

        Raises:
            StageError: The system has no shared memory left.
        """
        if num_processes == 1:
            return cls(_counter(), _counter())
        context = multiprocessing.get_context("spawn")
        with _needing_shared_memory():
            return cls(context.Value("q", 0), context.Value("q", 0))

    def taken(self, num_shards: int) -> Iterator[int]:
        """Yield the numbers of the shards that this process takes."""
        while (number := _add(self.next_shard, 1)) < num_shards:
            yield number

    def stop(self) -> None:
        """Let nobody begin another shard."""
        self.next_shard.value = LAST


_shared: Shared
"""Of a process that encodes for another one."""


def encode_job(job: Job, encoder: Encoder) -> Tally:
    """Encode the shards of a job on all devices.

    Args:
        job: What there is to do.
        encoder: Loaded on the first device.

    Raises:
        StageError: As `encode_shards` does, or a process of another device failed or died.
    """
    others = pick_devices(job.settings.device)[1:]
    shared = Shared.among(1 + len(others))
    tally = Tally(devices=1 + len(others))
    num_images = sum(len(shard.image_ids) for shard in job.shards)
    with tqdm(total=num_images, desc="extract", unit="image", disable=None) as bar:

        def progress(done: int) -> None:
            bar.update(_add(shared.images_done, done) + done - bar.n)

        with _others(job, [str(device) for device in others], tally, shared):
            _encode(job, encoder, tally, shared, progress)
    tally.check(job.max_failures, len(job.source.image_ids))
    return tally


@contextlib.contextmanager
def _others(job: Job, devices: list[str], tally: Tally, shared: Shared) -> Iterator[None]:
    """Encode on some devices while the block does on its own; add to the tally what they did."""
    if not devices:
        yield
        return

    def stop_after_error(future: "Future[Tally]") -> None:
        if future.exception():
            shared.stop()

    before = multiprocessing.active_children()
    context = multiprocessing.get_context("spawn")
    with _needing_shared_memory():
        pool = ProcessPoolExecutor(len(devices), context, _remember, (shared,))
    with pool:
        with without_interrupts():
            running = [pool.submit(_encode_elsewhere, job, device) for device in devices]
        for future in running:
            future.add_done_callback(stop_after_error)
        try:
            yield
            for future in running:
                tally.add(future.result())
        except BrokenProcessPool:
            raise StageError(
                "extract: the process of a device died. Finished shards are kept; check its "
                "memory, or name fewer devices in encoder.device, and run again."
            ) from None
        except PatchcacheError:
            shared.stop()
            raise
        except BaseException:
            # Whoever stops this does not wait for a shard of another device.
            for process in multiprocessing.active_children():
                if process not in before:
                    process.kill()
            raise


def _counter() -> "Synchronized[int]":
    """Make a counter for the threads of this process alone."""
    # RLock: the stubs want one of multiprocessing.
    counter: Synchronized[int] = synchronized(c_longlong(0), RLock())  # type: ignore[call-overload]
    return counter


@contextlib.contextmanager
def _needing_shared_memory() -> Iterator[None]:
    """Say what the semaphores need that processes make in the block.

    Raises:
        StageError: It is not there.
    """
    try:
        yield
    except OSError as error:
        raise StageError(
            f"encoder.device: the processes of several devices need semaphores, which the system "
            f"keeps in /dev/shm: {error.strerror}. Give it some MB that can be written (docker run "
            f"--shm-size=64m), or name one device."
        ) from None


def _encode(
    job: Job,
    encoder: Encoder,
    tally: Tally,
    shared: Shared,
    progress: Callable[[int], object],
) -> None:
    encode_shards(
        job.shards,
        job.source,
        encoder,
        job.folder,
        workers=math.ceil(job.workers / tally.devices),
        max_failures=job.max_failures,
        tally=tally,
        taken=shared.taken(len(job.shards)),
        progress=progress,
    )


def _remember(shared: Shared) -> None:
    global _shared
    _shared = shared
    Thread(target=end_with_parent, daemon=True).start()


def _encode_elsewhere(job: Job, device: str) -> Tally:
    encoder = load_encoder(dataclasses.replace(job.settings, device=device))
    check_same_spec(encoder.spec, job.spec, device)
    check_probe(encoder, read_probe(job.probe, job.spec))
    tally = Tally(devices=len(pick_devices(job.settings.device)))
    _encode(job, encoder, tally, _shared, lambda done: _add(_shared.images_done, done))
    return tally


def _add(counter: "Synchronized[int]", number: int) -> int:
    """Add to a counter and return what it was before."""
    with counter.get_lock():
        before = counter.value
        counter.value += number
    return before
