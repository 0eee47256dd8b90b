"""Readers of single rows out of files: HDF5, npy, safetensors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from bench.readers.contender import (
    BATCH,
    COLUMN,
    FILE_ROWS,
    Contender,
    Rows,
    as_it_is,
    forever,
    loader_contenders,
    parts_of,
    random_loader,
)


class Hdf5Rows(Dataset[Rows]):
    """One HDF5 file, a row at a time: the usual data set of tutorials."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._features: h5py.Dataset | None = None
        with h5py.File(path) as file:
            self._num_rows = len(file[COLUMN])

    def __len__(self) -> int:
        return self._num_rows

    @property
    def features(self) -> h5py.Dataset:
        """The open data set: opened on first use, in each process."""
        if self._features is None:
            self._features = h5py.File(self._path)[COLUMN]
        return self._features

    def __getitem__(self, row: int) -> Rows:
        values: Rows = self.features[row]
        return values


class Hdf5Batches(Hdf5Rows):
    """The same, a batch at a time: h5py takes a list of rows if it ascends."""

    def __getitems__(self, rows: list[int]) -> Tensor:
        """Return the batch that torch's loader asks for: float16 [B, P, D]."""
        order = np.argsort(rows)
        return torch.from_numpy(self.features[np.asarray(rows)[order]][np.argsort(order)])


def hdf5(folder: Path, features: Rows) -> dict[str, Contender]:
    """One contiguous HDF5 file."""
    path = folder / "one.h5"
    with h5py.File(path, "w") as file:
        file[COLUMN] = features

    def row_by_row() -> Iterator[Rows]:
        rows = Hdf5Rows(path)
        sampler = BatchSampler(RandomSampler(rows), BATCH, drop_last=True)
        return forever(lambda: (np.stack([rows[row] for row in batch]) for batch in sampler))

    def by_batch(workers: int) -> DataLoader[Any]:
        return random_loader(Hdf5Batches(path), workers, collate_fn=as_it_is)

    return {
        "h5py, row by row": Contender(row_by_row, folder, is_loader=False),
        **loader_contenders(
            "h5py in a DataLoader", folder, lambda w: random_loader(Hdf5Rows(path), w)
        ),
        **loader_contenders("h5py in a DataLoader, list of rows", folder, by_batch, False),
    }


class NumpyFiles(Dataset[Rows]):
    """One npy file a row."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self._folder, self._num_rows = folder, num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Rows:
        values: Rows = np.load(self._folder / f"{row}.npy")
        return values


def numpy_files(folder: Path, features: Rows) -> dict[str, Contender]:
    """One npy file a row, in torch's loader."""
    for row, values in enumerate(features):
        np.save(folder / f"{row}.npy", values)
    return loader_contenders(
        "one npy a file in a DataLoader",
        folder,
        lambda workers: random_loader(NumpyFiles(folder, len(features)), workers),
    )


class SafetensorsRows(Dataset[Tensor]):
    """Safetensors files of `FILE_ROWS` rows each, a slice at a time."""

    def __init__(self, paths: list[Path], num_rows: int) -> None:
        self._paths, self._num_rows = paths, num_rows
        self._slices: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> Tensor:
        file, place = divmod(row, FILE_ROWS)
        if file not in self._slices:
            # Opened on first use, in each process.
            opened: Any = safe_open(self._paths[file], "pt")
            self._slices[file] = opened.get_slice(COLUMN)
        values: Tensor = self._slices[file][place]
        return values


def safetensors(folder: Path, features: Rows) -> dict[str, Contender]:
    """Safetensors: `safe_open` and `get_slice`, its documentation's way to load a part."""
    paths = [folder / f"{number}.safetensors" for number in range(-(-len(features) // FILE_ROWS))]
    for path, part in zip(paths, parts_of(features), strict=True):
        save_file({COLUMN: torch.from_numpy(part)}, path)
    return loader_contenders(
        "safetensors slices in a DataLoader",
        folder,
        lambda workers: random_loader(SafetensorsRows(paths, len(features)), workers),
    )
