"""A reader of the S3 server in a process of its own; every row is checked."""

import numpy as np
import pytest

from bench.remote_readers import LOCAL, READERS, WINDOWED
from bench.remote_runs import run_reader, sorted_ends
from bench.s3_server import BUCKET, Network, serving
from bench.stores import random_rows

pytestmark = pytest.mark.slow("starts processes that import torch")

ROWS = 100


@pytest.fixture(scope="module")
def features():
    return random_rows(np.random.default_rng(0), ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, features):
    folder = tmp_path_factory.mktemp("benchmark")
    written = folder / BUCKET / "ours"
    written.mkdir(parents=True)
    READERS[WINDOWED].write(written, features)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder / BUCKET, Network()) as server:
        yield server


def run(name, folder, server, expected):
    np.save(folder / "ends.npy", sorted_ends([expected]))
    return run_reader(name, 0, folder, server, ROWS, later_seconds=0.0)


def test_a_run_reports_rates_and_what_the_server_did(folder, server, features):
    remote, local = (run(name, folder, server, features) for name in (WINDOWED, LOCAL[WINDOWED]))
    assert remote.first_rate > 0
    assert remote.later_rate > 0
    assert remote.requests > 0
    assert remote.served == pytest.approx(1.0, abs=0.1)
    assert (local.requests, local.served) == (0, 0.0)
    assert not (folder / "local").exists()


def test_a_row_that_was_not_written_and_one_that_comes_twice_are_found(folder, server, features):
    other = features.copy()
    other[7, -1, -1] = 0
    with pytest.raises(RuntimeError, match="100 rows came, 99 of them right"):
        run(WINDOWED, folder, server, other)
    repeated = features.copy()
    repeated[7] = features[8]
    # What was written has the eighth row once; twice was wanted.
    with pytest.raises(RuntimeError, match="100 rows came"):
        run(WINDOWED, folder, server, repeated)
