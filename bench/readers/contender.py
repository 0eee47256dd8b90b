"""The interface of a reader in `bench.read`, and shared helpers.

Letters: B rows of a batch, P patches, D width of the vision tower.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from cache.files.foreign import describe

BATCH = 64
FILE_ROWS = 1024
"""Rows of a file, where a format has files of rows: 77 MB."""
COLUMN = "features"

WORKERS = (0, 2)
"""Each complete loader runs in the main process, and with two worker processes."""

FORK = multiprocessing.get_context("fork")

EXIT_SECONDS = 20.0
"""How long a process may take to end."""

Rows = NDArray[np.float16]
Batch = NDArray[Any] | Tensor

PREPARE_ERRORS = (
    ImportError,
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    AssertionError,
)
"""What a library that does not fit the others raises when it is imported or first used."""


@dataclass(frozen=True)
class Contender:
    """A way to read batches."""

    open: Callable[[], Iterator[Batch]]
    """Starts reading: float16 [B, P, D] at each step, without end."""
    folder: Path | None
    """Its files; None when it reads from memory."""
    is_loader: bool = True
    """Whether it is a complete loader of somebody else, into torch."""
    is_documented: bool = True
    """Whether it is the way that its documentation shows first."""


def write_apart(write: Callable[[], object]) -> None:
    """Let a library write its files in a forked process: its threads would not survive a fork.

    Raises:
        RuntimeError: It cannot.
    """
    pipe, theirs = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_report, args=(write, theirs))
    process.start()
    theirs.close()
    try:
        failed = pipe.recv()
    except EOFError:
        failed = "its process ended without an answer"
    end(process)
    if failed:
        raise RuntimeError(failed)


def end(process: ForkProcess) -> None:
    """Wait for a process that has nothing to do any more; a library's threads may keep it up."""
    process.join(EXIT_SECONDS)
    process.kill()
    process.join()


def _report(write: Callable[[], object], pipe: Connection) -> None:
    try:
        write()
        pipe.send("")
    except PREPARE_ERRORS as error:
        pipe.send(describe(error))


def forever(passes: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Iterate again and again over what each call returns."""
    while True:
        yield from passes()


def loader_contenders(
    name: str,
    folder: Path,
    open_loader: Callable[[int], Iterable[Batch]],
    is_documented: bool = True,
) -> dict[str, Contender]:
    """Return a loader as contenders, with each number of worker processes."""
    return {
        f"{name}, {workers} workers": Contender(
            partial(_repeated, open_loader, workers), folder, is_documented=is_documented
        )
        for workers in WORKERS
    }


def _repeated(open_loader: Callable[[int], Iterable[Batch]], workers: int) -> Iterator[Batch]:
    loader = open_loader(workers)
    return forever(lambda: loader)


class Unpacked:
    """Iterates over the one tensor in each batch of a loader, as [B, P, D]."""

    def __init__(self, loader: Iterable[Any], key: str | int, row_shape: tuple[int, ...]) -> None:
        self._loader, self._key, self._row_shape = loader, key, row_shape

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._loader:
            yield torch.as_tensor(batch[self._key]).view(-1, *self._row_shape)


def random_loader(dataset: Any, workers: int, **options: Any) -> DataLoader[Any]:
    """Return torch's loader of random batches, whose workers live as long as it does."""
    batches = BatchSampler(RandomSampler(dataset), BATCH, drop_last=True)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        **options,
    )


def as_it_is(batch: Tensor) -> Tensor:
    """Identity collate: the data set already returns batches."""
    return batch


def parts_of(features: Rows) -> list[Rows]:
    """Cut all rows into the rows of each file."""
    return [features[start : start + FILE_ROWS] for start in range(0, len(features), FILE_ROWS)]
