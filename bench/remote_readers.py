"""Readers of features that lie on an S3 server, each as its documentation has it.

Each writes its files once into a folder, which is then served, and reads them epoch by epoch. Ours
reads in both orders. LitData, MosaicML Streaming and webdataset shuffle chunks, then rows within
them, and keep the chunks on the local disk. Lance and tensorstore (Zarr v3) fetch rows at random
each time, a few batches at once; embedding-reader fetches large pieces in order. What they need is
in requirements-bench.txt, and imported only when it is used.

Letters: B rows of a batch, P patches, D width of the vision tower.
"""

import importlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from bench.readers import streams
from bench.readers.contender import BATCH, COLUMN, WORKERS, Batch, Rows, Unpacked
from bench.stores import SHARD_ROWS, SPEC, make_store
from cache import FeatureStore
from train.data.order import global_order, windowed_order
from train.data.prefetch import FeatureBatches

WINDOW = 4
"""Shards of a window of the windowed order."""
BATCHES_AT_ONCE = 4
"""Of a reader that fetches a batch when it is asked: threads that ask."""
ROW_SHAPE = (SPEC.patches, SPEC.width)
CPU = torch.device("cpu")

Epochs = Callable[[int], Iterable[Batch]]
"""Gives the batches of an epoch, by its number from 0: each [B, P, D], together all rows once."""


@dataclass(frozen=True)
class Source:
    """Where a reader finds its files."""

    url: str
    """Of its folder: an s3:// URL, or a local path."""
    endpoint: str
    """http:// URL of the server."""
    names: tuple[str, ...]
    """Of its files."""
    cache: Path
    """Empty folder for its local copies."""
    rows: int


@dataclass(frozen=True)
class RemoteReader:
    """A way to read features from an S3 server."""

    library: str
    """Imported before the clock starts."""
    files: str
    """Folder of its files in the bucket; readers of the same files name the same one."""
    write: Callable[[Path, Rows], object]
    """Writes the features into an empty folder, and the files somewhere in it."""
    open: Callable[[Source, int], Epochs]
    """Opens them, with a number of worker processes."""
    workers: tuple[int, ...] = (0,)
    """Numbers of worker processes to try."""
    keeps: bool = True
    """Whether later epochs read local copies."""
    is_local: bool = False
    """Whether it reads the files where they were written, without the server."""


def write_ours(folder: Path, features: Rows) -> None:
    """Write a store, as the folder `store`."""
    make_store(folder, len(features), lambda image_ids: features[image_ids])


def open_ours(order: str, source: Source, workers: int) -> Epochs:
    """Read a store through `FeatureBatches`, which needs no worker processes."""
    del workers
    store = FeatureStore(source.url)
    ids = store.image_ids
    shards = store.shards_of(ids)
    ahead = WINDOW * SHARD_ROWS // BATCH if order == "windowed" else 0

    def epoch(number: int) -> Iterable[Tensor]:
        if order == "windowed":
            rows = windowed_order(shards, WINDOW, 0, number)
        else:
            rows = global_order(len(ids), 0, number)
        batches = np.split(ids[rows], range(BATCH, len(ids), BATCH))
        return FeatureBatches(store, batches, CPU, read_ahead=ahead)

    return epoch


def write_litdata(folder: Path, features: Rows) -> None:
    """Write chunks of as many rows as our shards have: of whole batches.

    A chunk that two worker processes share is read as a whole for every few of its rows, and in few
    chunks that would be the rule.
    """
    np.save(folder / "source.npy", features)
    # It sets the start method for the whole process.
    start_method = multiprocessing.get_start_method()
    importlib.import_module("litdata").optimize(
        fn=partial(streams.tensor_of, folder / "source.npy"),
        inputs=list(range(len(features))),
        output_dir=str(folder / "chunks"),
        chunk_size=SHARD_ROWS,
        num_workers=1,
        verbose=False,
    )
    multiprocessing.set_start_method(start_method, force=True)
    (folder / "source.npy").unlink()


def open_litdata(source: Source, workers: int) -> Epochs:
    """LitData: chunks, shuffled, copied by obstore."""
    module = importlib.import_module("litdata")
    # It gives obstore no way to speak plain HTTP.
    module.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    rows = module.StreamingDataset(
        source.url, cache_dir=str(source.cache), shuffle=True, drop_last=False
    )
    loader = module.StreamingDataLoader(
        rows, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda number: loader


def open_streaming(source: Source, workers: int) -> Epochs:
    """MosaicML Streaming: shards, shuffled."""
    module = importlib.import_module("streaming")
    rows = module.StreamingDataset(
        remote=source.url, local=str(source.cache), shuffle=True, batch_size=BATCH
    )
    # Forked workers would share the connection that read the index: over plain HTTP one then takes
    # the bytes of another.
    for stream in rows.streams:
        stream._downloader.clean_up()
    loader = DataLoader(rows, BATCH, num_workers=workers, persistent_workers=workers > 0)
    return lambda number: Unpacked(loader, COLUMN, ROW_SHAPE)


def open_webdataset(source: Source, workers: int) -> Epochs:
    """webdataset: tar files over HTTP by curl, shuffled in a buffer, kept in its cache folder."""
    module = importlib.import_module("webdataset")
    bucket = source.url.removeprefix("s3://")
    urls = [f"{source.endpoint}/{bucket}/{name}" for name in source.names]
    rows = module.WebDataset(urls, shardshuffle=len(urls), cache_dir=str(source.cache))
    batches = rows.shuffle(streams.SHUFFLE_BUFFER).decode().to_tuple("npy").batched(BATCH)
    loader = module.WebLoader(
        batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda number: Unpacked(loader, 0, ROW_SHAPE)


def at_random(source: Source, read: Callable[[NDArray[np.int64]], Rows]) -> Epochs:
    """Give a reader's random batches; some threads ask for the next ones meanwhile."""

    def epoch(number: int) -> Iterator[Rows]:
        order = global_order(source.rows, 0, number)
        batches = iter(np.split(order, range(BATCH, source.rows, BATCH)))
        with ThreadPoolExecutor(BATCHES_AT_ONCE) as threads:
            pending: deque[Future[Rows]] = deque()
            pending.extend(threads.submit(read, ids) for ids in islice(batches, BATCHES_AT_ONCE))
            while pending:
                yield pending.popleft().result()
                pending.extend(threads.submit(read, ids) for ids in islice(batches, 1))

    return epoch


def write_lance(folder: Path, features: Rows) -> None:
    """Write a list of fixed length in each row."""
    import pyarrow as pa

    values = pa.FixedSizeListArray.from_arrays(features.reshape(-1), int(np.prod(ROW_SHAPE)))
    module = importlib.import_module("lance")
    module.write_dataset(pa.table({COLUMN: values}), str(folder), mode="overwrite")


def open_lance(source: Source, workers: int) -> Epochs:
    """Lance: `take` of random rows."""
    del workers
    options = {"aws_endpoint": source.endpoint, "allow_http": "true"}
    rows = importlib.import_module("lance").dataset(source.url, storage_options=options)

    def read(ids: NDArray[np.int64]) -> Rows:
        values = rows.take(ids, columns=[COLUMN])[COLUMN].combine_chunks()
        found: Rows = values.flatten().to_numpy().reshape(-1, *ROW_SHAPE)
        return found

    return at_random(source, read)


def write_zarr(folder: Path, features: Rows) -> None:
    """Write an array whose chunk is a row, and whose shard of chunks is as large as ours."""
    array = importlib.import_module("zarr").create_array(
        store=str(folder),
        shape=features.shape,
        chunks=(1, *ROW_SHAPE),
        shards=(SHARD_ROWS, *ROW_SHAPE),
        dtype=features.dtype,
        compressors=None,
    )
    array[:] = features


def open_tensorstore(source: Source, workers: int) -> Epochs:
    """Zarr v3 by tensorstore: random rows of one array."""
    del workers
    bucket, _, path = source.url.removeprefix("s3://").partition("/")
    place = {"driver": "s3", "bucket": bucket, "path": f"{path}/", "endpoint": source.endpoint}
    place |= {"aws_region": "us-east-1"}
    # Its default cache holds nothing, not even where the chunks lie.
    spec = {
        "driver": "zarr3",
        "kvstore": place,
        "context": {"cache_pool": {"total_bytes_limit": 1 << 26}},
    }
    array = importlib.import_module("tensorstore").open(spec, read=True).result()
    return at_random(source, lambda ids: np.asarray(array[ids].read().result()))


def write_npy(folder: Path, features: Rows) -> None:
    """Write npy files of two dimensions, as large as our shards."""
    parts = np.split(
        features.reshape(len(features), -1), range(SHARD_ROWS, len(features), SHARD_ROWS)
    )
    for number, part in enumerate(parts):
        np.save(folder / f"{number:06}.npy", part)


def open_embedding_reader(source: Source, workers: int) -> Epochs:
    """embedding-reader: pieces in order, by fsspec."""
    del workers
    files = fsspec.url_to_fs(source.url)[0], [f"{source.url}/{name}" for name in source.names]
    # Its own listing asks for the pattern `folder**/*.npy`, which today's fsspec refuses.
    module: Any = importlib.import_module("embedding_reader.numpy_reader")
    module.get_file_list = lambda *_: files
    reader = module.NumpyReader(source.url)

    def epoch(number: int) -> Iterator[Rows]:
        for values, _ in reader(batch_size=SHARD_ROWS, show_progress=False):
            yield values.reshape(-1, *ROW_SHAPE)

    return epoch


WINDOWED, GLOBAL = "ours, windowed order", "ours, global order"
LOCAL = {name: f"{name}, from the local disk" for name in (WINDOWED, GLOBAL)}
LITDATA, STREAMING = "LitData", "MosaicML Streaming"


def our_readers(name: str, order: str) -> dict[str, RemoteReader]:
    """Return a reader of our store from the server, and the same of the local folder."""
    return {
        shown: RemoteReader(
            "s3fs", "ours/store", write_ours, partial(open_ours, order), is_local=is_local
        )
        for shown, is_local in ((name, False), (LOCAL[name], True))
    }


READERS: dict[str, RemoteReader] = {
    **our_readers(WINDOWED, "windowed"),
    **our_readers(GLOBAL, "global"),
    LITDATA: RemoteReader("litdata", "litdata/chunks", write_litdata, open_litdata, WORKERS),
    STREAMING: RemoteReader("streaming", "mds", streams.streaming, open_streaming, WORKERS),
    "webdataset": RemoteReader("webdataset", "tar", streams.webdataset, open_webdataset, WORKERS),
    "Lance": RemoteReader("lance", "rows.lance", write_lance, open_lance, keeps=False),
    "tensorstore": RemoteReader("tensorstore", "zarr", write_zarr, open_tensorstore, keeps=False),
    "embedding-reader": RemoteReader(
        "embedding_reader", "npy", write_npy, open_embedding_reader, keeps=False
    ),
}
