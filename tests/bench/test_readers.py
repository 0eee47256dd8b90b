"""Every reader of `bench.read` gives rows of the features that it wrote, each once an epoch.

Libraries of requirements-bench.txt alone are tested where `make bench` has installed them.
"""

import importlib.util
from functools import partial

import numpy as np
import pytest

from bench.peers import PEERS
from bench.readers.contender import BATCH, write_apart
from bench.stores import random_rows

LIBRARIES = {
    "MosaicML Streaming": "streaming",
    "LitData": "litdata",
    "webdataset": "webdataset",
    "embedding-reader": "embedding_reader",
    "HF datasets": "datasets",
    "Lance": "lance",
    "zarrs": "zarrs",
    "TensorStore": "tensorstore",
    "Grain": "grain",
}
"""Readers whose libraries are not locked for the project."""

ROWS = 5 * BATCH

pytestmark = [
    pytest.mark.slow("starts loaders with worker processes"),
    pytest.mark.filterwarnings("default"),
]


def cases():
    for name in PEERS:
        library = LIBRARIES.get(name)
        is_missing = library is not None and importlib.util.find_spec(library) is None
        skip = pytest.mark.skipif(is_missing, reason=f"{library} is of requirements-bench.txt")
        yield pytest.param(name, marks=skip)


def check(contender, wanted):
    """Read an epoch; the rows that came must be different ones of those that were written."""
    batches = contender.open()
    found = np.concatenate([np.asarray(next(batches)) for _ in range(ROWS // BATCH)])
    assert found.shape == (ROWS, 49, 768)
    keys = {row.astype(np.float16).tobytes() for row in found}
    assert keys <= wanted
    assert len(keys) == ROWS, f"{len(keys)} different rows of {ROWS}"


@pytest.mark.parametrize("name", list(cases()))
def test_an_epoch_has_every_row_once(tmp_path, name):
    features = random_rows(np.random.default_rng(0), ROWS)
    wanted = {row.tobytes() for row in features}
    for contender in PEERS[name](tmp_path, features).values():
        # In a process of its own, as `bench.read` has it.
        write_apart(partial(check, contender, wanted))
