"""How fast random batches of features are read, beside what one would do otherwise.

    python -m bench.read

The limit is an array in memory that numpy gathers from. Everything is warm: the files were just
written and fit the page cache.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from bench.measure import compare
from cache import FeatureStore, Spec
from cache.plan import plan_shards
from cache.publish import publish
from cache.shard import write_shard
from cache.spec import FORMAT

ROWS, PATCHES, WIDTH = 8192, 49, 768
BATCH, BATCHES = 64, 32
"""Rows of a batch, and batches of a run."""

SPEC = Spec(
    format=FORMAT,
    model="ViT-B-32-quickgelu",
    weights_sha256="0" * 64,
    activation="quick_gelu",
    layer=-2,
    tokens="patch",
    normalized=False,
    image_size=224,
    resize="shortest",
    crop="center",
    interpolation="bicubic",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    precision="fp32",
    batch_size=BATCH,
    dtype="float16",
    patches=PATCHES,
    width=WIDTH,
    preprocess_version=1,
)


class Rows(Dataset[NDArray[np.float16]]):
    """One HDF5 file, a row at a time: the usual data set of tutorials."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: h5py.File | None = None

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> NDArray[np.float16]:
        if self._file is None:
            self._file = h5py.File(self._path)
        row: NDArray[np.float16] = self._file["features"][index]
        return row


def make_store(folder: Path, features: NDArray[np.float16]) -> FeatureStore:
    """Write the features as a store of several shards and open it."""
    image_ids = np.arange(ROWS, dtype=np.int64)
    plan = plan_shards(image_ids, image_ids.astype(np.uint64), SPEC.fingerprint, 1024)
    for shard in plan:
        path = folder / "finished" / shard.name
        write_shard(path, SPEC, shard.image_ids, features[shard.image_ids])
    publish(folder / "store", plan, folder / "finished", SPEC)
    return FeatureStore(folder / "store")


def random_batches() -> NDArray[np.int64]:
    """Return other rows at every call: int64 [batches, batch]."""
    return GENERATOR.integers(0, ROWS, (BATCHES, BATCH))


GENERATOR = np.random.default_rng(0)


def contenders(folder: Path) -> dict[str, Callable[[], int]]:
    """Write the same rows in every way and return the readers, ours first."""
    features = GENERATOR.standard_normal((ROWS, PATCHES, WIDTH), np.float32).astype(np.float16)
    store = make_store(folder, features)
    with h5py.File(folder / "one.h5", "w") as file:
        file["features"] = features
    for number, row in enumerate(features):
        np.save(folder / f"{number}.npy", row)
    rows = Rows(folder / "one.h5")
    out = np.empty((BATCH, PATCHES, WIDTH), np.float16)

    def each(read: Callable[[NDArray[np.int64]], object]) -> Callable[[], int]:
        def work() -> int:
            for image_ids in random_batches():
                read(image_ids)
            return BATCH * BATCHES

        return work

    def loader(workers: int) -> Callable[[], int]:
        def work() -> int:
            batches = random_batches().tolist()
            for _ in DataLoader(rows, batch_sampler=batches, num_workers=workers):
                pass
            return BATCH * BATCHES

        return work

    return {
        "FeatureStore.gather": each(lambda ids: store.gather(ids, out)),
        "array in memory, np.take": each(lambda ids: np.take(features, ids, axis=0, out=out)),
        "h5py, row by row": each(lambda ids: np.stack([rows[i] for i in ids.tolist()])),
        "DataLoader over h5py, 0 workers": loader(0),
        "DataLoader over h5py, 2 workers": loader(2),
        "one npy file a row": each(
            lambda ids: np.stack([np.load(folder / f"{i}.npy") for i in ids.tolist()])
        ),
    }


def main() -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare(
            "read",
            contenders(Path(folder)),
            unit="rows",
            repeats=5,
            libraries=("h5py", "numpy", "torch"),
            setting={"rows": ROWS, "patches": PATCHES, "width": WIDTH, "batch": BATCH},
        )


if __name__ == "__main__":
    main()
