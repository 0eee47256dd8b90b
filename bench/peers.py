"""The readers that are measured beside ours, by the name of what they read with.

StreamingDataset, webdataset, LitData and embedding-reader read in order (`bench.readers.streams`);
the others read any row in any order. Where a faster way than the documented one was found it is
there too.
"""

from collections.abc import Callable
from pathlib import Path

from bench.readers.arrays import tensorstore, zarrs
from bench.readers.contender import Contender, Rows
from bench.readers.records import grain
from bench.readers.row_files import hdf5, numpy_files, safetensors
from bench.readers.streams import embedding_reader, litdata, streaming, webdataset
from bench.readers.tables import huggingface, lance

PEERS: dict[str, Callable[[Path, Rows], dict[str, Contender]]] = {
    "h5py": hdf5,
    "MosaicML Streaming": streaming,
    "LitData": litdata,
    "webdataset": webdataset,
    "embedding-reader": embedding_reader,
    "HF datasets": huggingface,
    "Lance": lance,
    "one npy a file": numpy_files,
    "safetensors": safetensors,
    "zarrs": zarrs,
    "TensorStore": tensorstore,
    "Grain": grain,
}
