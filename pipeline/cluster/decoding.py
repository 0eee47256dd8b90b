"""The tasks that decode batches, on every CPU of the cluster.

An encoder asks for the batches of its shards itself and takes them in order, so that no more of
them wait in Ray's object store than it allows. Ray runs a task again whose process or node died.
Torch is not imported in the processes of these tasks.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import PatchcacheError
from cache.texts import one_line
from pipeline.encoding.batches import BatchDecoder, DecodedBatch, Job
from pipeline.images.source import ImageSource
from workspace.errors import StageError

MAX_RETRIES = 5
"""How often Ray runs a task again whose process or node died."""


@dataclass(frozen=True)
class ClusterJob:
    """A job, with what the processes of other machines must know of its workspace."""

    job: Job
    workspace: Path
    """The driver's working directory, absolute."""
    marker: Path
    """A file in the job's folder, absolute; a process that reads the same content there shares the
    folder."""
    marker_content: str

    def enter(self) -> None:
        """Make relative paths those of the driver, where the workspace is shared."""
        with contextlib.suppress(OSError):
            os.chdir(self.workspace)


def node_name() -> str:
    """Return how errors name this node."""
    import ray

    return f"node {ray.util.get_node_ip_address()}"


def decode_batch(holder: "list[Any]", number: int) -> DecodedBatch:
    """Decode a batch of the job whose reference is in a list, which Ray does not resolve."""
    return _decoder(holder[0]).decode(number)


@functools.cache
def _decoder(reference: Any) -> BatchDecoder:
    import ray

    cluster_job: ClusterJob = ray.get(reference)
    cluster_job.enter()
    job = cluster_job.job
    check_images(job.source)
    return BatchDecoder(job.shards, job.source, job.spec)


def check_images(source: ImageSource) -> None:
    """Refuse a node that does not have the images.

    Raises:
        StageError: Names the node and the path.
    """
    for archive in source.archives.values():
        for path in archive.missing_paths():
            raise StageError(
                f"{node_name()}: {Path(path).absolute()}: no such images there. Share the folder "
                f"with all nodes under one path, or name the images by URL."
            )


def decode_ahead(
    holder: "list[Any]", numbers: Iterable[int], window: int
) -> Iterator[DecodedBatch]:
    """Start to decode batches on the cluster; return an iterator of them, in order.

    Args:
        holder: Holds the reference of the job.
        numbers: Of the batches.
        window: Batches that are decoded or wait at one time.

    Raises:
        StageError: From the task; or its process died again and again.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(decode_batch)
    rest = iter(numbers)
    waiting = deque(task.remote(holder, number) for number in itertools.islice(rest, window))

    def results() -> Iterator[DecodedBatch]:
        while waiting:
            batch = _result(waiting.popleft())
            waiting.extend(task.remote(holder, number) for number in itertools.islice(rest, 1))
            yield batch

    return results()


def _result(reference: Any) -> DecodedBatch:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        batch: DecodedBatch = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PatchcacheError | OSError):
            raise error.cause from None
        raise
    except RayError as error:
        raise StageError(
            f"extract: a batch of images was not decoded in {MAX_RETRIES + 1} tries, whose "
            f"processes died: {one_line(error)}. Finished shards are kept; check the memory of the "
            f"nodes, and run again."
        ) from None
    # A copy frees the object store, whose arrays are read-only.
    return dataclasses.replace(batch, pixels_BSSC=batch.pixels_BSSC.copy())
