"""Readers of tables: Hugging Face datasets over Arrow, and Lance."""

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from bench.readers.contender import (
    BATCH,
    COLUMN,
    Contender,
    Rows,
    Unpacked,
    as_it_is,
    forever,
    loader_contenders,
    parts_of,
    random_loader,
    write_apart,
)


def huggingface(folder: Path, features: Rows) -> dict[str, Contender]:
    """Hugging Face datasets: its torch format by whole batches, and its arrow format viewed.

    As lists of fixed length: its Array2D was half as fast, its numpy format a quarter.
    """
    module = importlib.import_module("datasets")
    _write_arrow(module, folder, features)
    row_shape = features.shape[1:]

    def as_torch(workers: int) -> Iterable[Tensor]:
        rows = module.load_from_disk(str(folder)).with_format("torch", dtype=torch.float16)
        loader: DataLoader[Any] = DataLoader(
            rows,
            batch_size=None,
            sampler=BatchSampler(RandomSampler(rows), BATCH, drop_last=True),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        return Unpacked(loader, COLUMN, row_shape)

    def as_arrow() -> Iterator[Tensor]:
        rows = module.load_from_disk(str(folder)).with_format("arrow")
        sampler = BatchSampler(RandomSampler(rows), BATCH, drop_last=True)
        while True:
            for batch in sampler:
                values = rows[batch][COLUMN].combine_chunks().flatten().to_numpy()
                yield torch.from_numpy(values).view(-1, *row_shape)

    return {
        **loader_contenders("HF datasets, torch format", folder, as_torch),
        "HF datasets, arrow format viewed": Contender(as_arrow, folder, is_documented=False),
    }


def _write_arrow(module: Any, folder: Path, features: Rows) -> None:
    module.Dataset(arrow_table(features)).save_to_disk(str(folder))


def arrow_table(features: Rows) -> pa.Table:
    """Return a table of one column, whose values are lists of fixed length."""
    num_values = int(np.prod(features.shape[1:]))
    chunks = [
        pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), num_values)
        for part in parts_of(features)
    ]
    return pa.table({COLUMN: pa.chunked_array(chunks)})


class LanceRows(Dataset[Tensor]):
    """A Lance dataset, by `take`; opened on first use, in each process."""

    def __init__(self, path: str, num_rows: int, row_shape: tuple[int, ...]) -> None:
        self._path, self._num_rows, self._row_shape = path, num_rows, row_shape
        self._dataset: Any = None

    def __len__(self) -> int:
        return self._num_rows

    def __getitems__(self, rows: list[int]) -> Tensor:
        """Return the batch that torch's loader asks for: float16 [B, P, D]."""
        if self._dataset is None:
            self._dataset = importlib.import_module("lance").dataset(self._path)
        column = self._dataset.take(rows)[COLUMN].combine_chunks()
        return torch.from_numpy(column.flatten().to_numpy()).view(-1, *self._row_shape)


def lance(folder: Path, features: Rows) -> dict[str, Contender]:
    """Lance: `take` in torch's loader, and its own LanceDataset, which shuffles whole batches.

    `take` as in its SafeLanceDataset, whose worker processes are spawned as here, but without its
    lists of Python numbers. LanceDataset as its page on PyTorch has it, in one process.
    """
    module, path = importlib.import_module("lance"), str(folder / "rows.lance")
    data, sampler = importlib.import_module("lance.torch.data"), module.sampler
    write_apart(lambda: module.write_dataset(arrow_table(features), path))

    def taken(workers: int) -> DataLoader[Any]:
        rows = LanceRows(path, len(features), features.shape[1:])
        context = "spawn" if workers else None
        return random_loader(rows, workers, collate_fn=as_it_is, multiprocessing_context=context)

    def shuffled() -> Iterator[Tensor]:
        by_batch = sampler.ShardedBatchSampler(0, 1, randomize=True)
        rows = data.LanceDataset(path, BATCH, columns=[COLUMN], sampler=by_batch)
        batches = (batch for batch in forever(lambda: rows) if len(batch) == BATCH)
        return (batch.view(-1, *features.shape[1:]) for batch in batches)

    return {
        **loader_contenders("Lance take in a DataLoader", folder, taken),
        "Lance LanceDataset, whole batches shuffled": Contender(shuffled, folder),
    }
