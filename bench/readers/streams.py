"""Readers that stream files in order, and most of which shuffle on the way.

Shards or chunks are shuffled first, then rows: in a buffer of `SHUFFLE_BUFFER`, or within a chunk
or block. That is their way, and easier than reading at random.
"""

import importlib
import multiprocessing
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor
from torch.utils.data import DataLoader

from bench.readers.contender import (
    BATCH,
    COLUMN,
    Batch,
    Contender,
    Rows,
    Unpacked,
    loader_contenders,
    parts_of,
    random_loader,
)

SHUFFLE_BUFFER = 1000
"""Rows, as webdataset's documentation advises."""
CHUNK_BYTES = 1 << 26
"""Of a chunk or shard: the default or the documented size of MDS and LitData."""
TAR_BYTES = 1 << 27
"""Of a tar file, so that there are some to shuffle."""


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
        tars = module.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        rows = tars.shuffle(SHUFFLE_BUFFER)
        batches = rows.decode().to_tuple("npy").batched(BATCH, partial=False)
        loader = module.WebLoader(
            batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )
        return Unpacked(loader, 0, features.shape[1:])

    return loader_contenders("webdataset", folder, shuffled)


def embedding_reader(folder: Path, features: Rows) -> dict[str, Contender]:
    """embedding-reader: npy files in order, as its README shows; no shuffle, and float32.

    It is told which files there are: its own pattern for them is one that fsspec now refuses.
    """
    module: Any = importlib.import_module("embedding_reader.numpy_reader")
    for number, part in enumerate(parts_of(features)):
        np.save(folder / f"{number:05}.npy", part.reshape(len(part), -1))

    paths = sorted(map(str, folder.glob("*.npy")))
    module.get_file_list = lambda *_: (LocalFileSystem(), paths)

    def in_order() -> Iterator[Batch]:
        reader = module.NumpyReader(str(folder))
        whole = reader.count - reader.count % BATCH
        while True:
            batches = reader(batch_size=BATCH, end=whole, show_progress=False)
            try:
                for batch, _ in batches:
                    yield torch.from_numpy(batch).view(-1, *features.shape[1:])
            finally:
                # Left in the middle, its threads wait for ever.
                for _ in batches:
                    pass

    return {"embedding-reader, in order": Contender(in_order, folder, is_loader=False)}
