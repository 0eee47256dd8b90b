"""Other ways to read random batches of features, each as its documentation has it.

Every peer writes its own files once. `open` then gives batches of random rows without end.
What they need is in requirements-bench.txt and imported here only when a peer is prepared.

StreamingDataset, webdataset and LitData read in order and shuffle on the way: shards or chunks
first, then rows (in a buffer of `SHUFFLE_BUFFER`, or within a chunk or block). That is their way,
and easier than reading at random. The others read any row in any order. Where a faster way than
the documented one was found it is there too.

Letters: B rows of a batch, P patches, D width of the vision tower.
"""

import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

BATCH = 64
SHUFFLE_BUFFER = 1000
"""Rows, as webdataset's documentation advises."""
CHUNK_BYTES = 1 << 26
"""Of a chunk or shard: the default or the documented size of MDS and LitData."""
TAR_BYTES = 1 << 27
"""Of a tar file, so that there are some to shuffle."""
COLUMN = "features"

WORKERS = (0, 2)
"""Each complete loader runs in the main process, and with two worker processes."""

Rows = NDArray[np.float16]
Batch = Rows | Tensor


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


def as_it_is(batch: Tensor) -> Tensor:
    """Collate nothing: the data set returned a batch."""
    return batch


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


def streaming(folder: Path, features: Rows) -> dict[str, Contender]:
    """MosaicML Streaming: its shuffled StreamingDataset, and its LocalDataset at random.

    It declares numpy below 2.2 and transformers below 5; it runs with newer ones.
    """
    module = importlib.import_module("streaming")
    row_shape = features.shape[1:]
    column = f"ndarray:float16:{','.join(map(str, row_shape))}"
    with module.MDSWriter(
        out=str(folder), columns={COLUMN: column}, size_limit=CHUNK_BYTES
    ) as writer:
        for values in features:
            writer.write({COLUMN: values})

    def shuffled(workers: int) -> Iterable[Tensor]:
        # A StreamingDataset that was not closed leaves shared memory under its folder's name.
        module.base.util.clean_stale_shared_memory()
        rows = module.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
        loader = DataLoader(
            rows, BATCH, num_workers=workers, drop_last=True, persistent_workers=workers > 0
        )
        return Unpacked(loader, COLUMN, row_shape)

    def local(workers: int) -> Iterable[Tensor]:
        loader = random_loader(module.LocalDataset(str(folder)), workers)
        return Unpacked(loader, COLUMN, row_shape)

    return {
        **loader_contenders("MosaicML StreamingDataset", folder, shuffled),
        **loader_contenders("MosaicML LocalDataset", folder, local, False),
    }


def litdata(folder: Path, features: Rows) -> dict[str, Contender]:
    """LitData: chunks, shuffled by its StreamingDataset."""
    module = importlib.import_module("litdata")
    np.save(folder / "source.npy", features)
    chunks = folder / "chunks"
    # It sets the start method for the whole process, which would change the other loaders.
    start_method = multiprocessing.get_start_method()
    module.optimize(
        fn=partial(tensor_of, folder / "source.npy"),
        inputs=list(range(len(features))),
        output_dir=str(chunks),
        chunk_bytes=CHUNK_BYTES,
        num_workers=1,
        verbose=False,
    )
    multiprocessing.set_start_method(start_method, force=True)
    (folder / "source.npy").unlink()

    def shuffled(workers: int) -> Iterable[Tensor]:
        rows = module.StreamingDataset(str(chunks), shuffle=True, drop_last=True)
        loader: Iterable[Tensor] = module.StreamingDataLoader(
            rows, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
        )
        return loader

    return loader_contenders("LitData", folder, shuffled)


def tensor_of(path: Path, row: int) -> Tensor:
    """Return one row of an npy file; LitData calls it in another process."""
    return torch.from_numpy(np.load(path, mmap_mode="r")[row].copy())


def webdataset(folder: Path, features: Rows) -> dict[str, Contender]:
    """webdataset: tar files, shuffled in a buffer."""
    module = importlib.import_module("webdataset")
    pattern = str(folder / "%06d.tar")
    with module.ShardWriter(pattern, maxsize=TAR_BYTES, verbose=0) as writer:
        for row, values in enumerate(features):
            writer.write({"__key__": str(row), "npy": values})
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def shuffled(workers: int) -> Iterable[Tensor]:
        rows = module.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHUFFLE_BUFFER)
        batches = rows.decode().to_tuple("npy").batched(BATCH, partial=False)
        loader = module.WebLoader(
            batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )
        return Unpacked(loader, 0, features.shape[1:])

    return loader_contenders("webdataset", folder, shuffled)


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
    import pyarrow as pa

    num_values = int(np.prod(features.shape[1:]))
    chunks = [
        pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), num_values)
        for part in np.array_split(features, max(1, len(features) // 1024))
    ]
    module.Dataset(pa.table({COLUMN: pa.chunked_array(chunks)})).save_to_disk(str(folder))


PEERS: dict[str, Callable[[Path, Rows], dict[str, Contender]]] = {
    "h5py": hdf5,
    "MosaicML Streaming": streaming,
    "LitData": litdata,
    "webdataset": webdataset,
    "HF datasets": huggingface,
    "one npy a file": numpy_files,
}
