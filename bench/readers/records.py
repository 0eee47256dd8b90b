"""Readers of records: Grain over ArrayRecord."""

import importlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.readers.contender import (
    BATCH,
    Contender,
    Rows,
    loader_contenders,
    parts_of,
    write_apart,
)

WRITER = "group_size:1,uncompressed"
READER = {"index_storage_option": "in_memory"}
"""As ArrayRecord's performance guide has it for random access; reading ahead is off already."""


def parsed(row_shape: tuple[int, ...], record: bytes) -> Rows:
    """Turn the bytes of a record into a row; also in worker processes."""
    return np.frombuffer(record, np.float16).reshape(row_shape)


def grain(folder: Path, features: Rows) -> dict[str, Contender]:
    """Grain: its tutorial on ArrayRecord, with shuffle and map of a MapDataset.

    Threads read rows ahead (`to_iter_dataset`), in worker processes too (`mp_prefetch`); batches
    are made of these. The default, 500 elements ahead, would be 2.4 GB of batches a process.
    """
    module = importlib.import_module("grain")
    records = importlib.import_module("array_record.python.array_record_module")

    def write() -> None:
        for number, part in enumerate(parts_of(features)):
            writer = records.ArrayRecordWriter(str(folder / f"{number:05}.array_record"), WRITER)
            for row in part:
                writer.write(row.tobytes())
            writer.close()

    write_apart(write)
    parse = partial(parsed, features.shape[1:])
    paths = sorted(map(str, folder.glob("*.array_record")))

    def shuffled(workers: int) -> Iterable[Tensor]:
        source = module.sources.ArrayRecordDataSource(paths, reader_options=READER)
        rows = module.MapDataset.source(source).seed(0).shuffle().repeat().map(parse)
        batches = rows.to_iter_dataset().batch(BATCH, drop_remainder=True)
        if workers:
            options = module.multiprocessing.MultiprocessingOptions(num_workers=workers)
            batches = batches.mp_prefetch(options)
        return TensorBatches(batches)

    return loader_contenders("Grain over ArrayRecord", folder, shuffled)


class TensorBatches:
    """Iterates over the arrays of a loader, as tensors."""

    def __init__(self, arrays: Any) -> None:
        self._arrays = arrays

    def __iter__(self) -> Iterator[Tensor]:
        return map(torch.from_numpy, self._arrays)
