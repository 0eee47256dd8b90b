"""Readers of chunked arrays: Zarr v3 with shards, by zarrs and by TensorStore.

A chunk is a row, a shard has `FILE_ROWS` rows, and nothing is compressed.
"""

import importlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from bench.readers.contender import (
    BATCH,
    FILE_ROWS,
    Batch,
    Contender,
    Rows,
    loader_contenders,
    random_loader,
    write_apart,
)
from train.data.order import global_order

ZARRS = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
"""The one setting that its README asks for."""

CACHE_BYTES = 1 << 26
"""TensorStore's documentation advises a cache for the indexes of shards: 16 KB each."""


class ZarrRows(Dataset[Rows]):
    """A Zarr array, a row at a time; opened on first use, in each process."""

    def __init__(self, path: str, num_rows: int) -> None:
        self._path, self._num_rows = path, num_rows
        self._array: Any = None

    def __len__(self) -> int:
        return self._num_rows

    @property
    def array(self) -> Any:
        """The open array, whose codecs are those of zarrs."""
        if self._array is None:
            zarr = importlib.import_module("zarr")
            zarr.config.set(ZARRS)
            self._array = zarr.open_array(self._path, mode="r")
        return self._array

    def __getitem__(self, row: int) -> Rows:
        values: Rows = self.array[row]
        return values


def zarrs(folder: Path, features: Rows) -> dict[str, Contender]:
    """The codecs of zarrs under zarr-python, a row at a time.

    Rows that are not neighbours are left to zarr-python: `oindex` of a batch was ten times slower.
    """
    importlib.import_module("zarrs")
    path = str(folder / "rows.zarr")
    write_apart(partial(_write_zarr, path, features))
    return loader_contenders(
        "zarrs in a DataLoader",
        folder,
        lambda workers: random_loader(ZarrRows(path, len(features)), workers),
    )


def _write_zarr(path: str, features: Rows) -> None:
    array = importlib.import_module("zarr").create_array(
        path,
        shape=features.shape,
        shards=(FILE_ROWS, *features.shape[1:]),
        chunks=(1, *features.shape[1:]),
        dtype=features.dtype,
        compressors=None,
    )
    array[:] = features


def tensorstore(folder: Path, features: Rows) -> dict[str, Contender]:
    """TensorStore: rows by an array of their numbers, read while the batch before is used.

    As its tutorial has it: asynchronous reads of `store[rows]`, and its page on the driver zarr3: a
    cache for the indexes of shards, and metadata that are read once.
    """
    module, path = importlib.import_module("tensorstore"), folder / "rows.zarr"
    write_apart(partial(_write_zarr, str(path), features))
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "context": {"cache_pool": {"total_bytes_limit": CACHE_BYTES}},
        "recheck_cached_metadata": "open",
        "recheck_cached_data": "open",
    }

    def ahead() -> Iterator[Batch]:
        store, pending = module.open(spec).result(), None
        for rows in _random_batches(len(features)):
            following = store[rows].read()
            if pending is not None:
                yield torch.from_numpy(pending.result())
            pending = following

    return {"TensorStore, zarr3": Contender(ahead, folder)}


def _random_batches(num_rows: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    epoch = 0
    while True:
        order = global_order(num_rows, 0, epoch)[: num_rows - num_rows % BATCH]
        yield from order.reshape(-1, BATCH)
        epoch += 1
