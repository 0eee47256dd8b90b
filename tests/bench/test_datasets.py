"""Hugging Face datasets reads a store as it is: from a folder, and by the card of its repository.

The library is of requirements-bench.txt alone, and so `make bench` is where this runs.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cache import FeatureStore, Spec, write_store
from cache.card import write_card
from cache.card_text import CardSettings
from tests.cache.remote.played_hub import PlayedHub, Repository

pytestmark = [
    pytest.mark.slow("starts processes that import Hugging Face datasets"),
    pytest.mark.skipif(
        importlib.util.find_spec("datasets") is None,
        reason="datasets is of requirements-bench.txt, which `make bench` installs",
    ),
]

ROWS = 600
"""More than one shard."""

SAVE = """
import sys, numpy as np
assert rows.features["features"].dtype == "float16" and len(rows) == int(sys.argv[2])
rows = rows.with_format("numpy")[:]
np.savez(sys.argv[1], image_id=rows["image_id"], features=rows["features"])
"""

BY_NAME = 'from datasets import load_dataset\nrows = load_dataset("me/features", split="train")\n'

STREAMED = """
import sys, numpy as np
rows = list(rows)
ids, features = zip(*((row["image_id"], row["features"]) for row in rows))
np.savez(sys.argv[1], image_id=np.array(ids), features=np.array(features))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store with a card, as a repository holds it."""
    folder = tmp_path_factory.mktemp("store") / "features"
    spec = Spec.external(model="net", about="random", patches=4, width=6)
    values = np.random.default_rng(0).standard_normal((ROWS, 4, 6)).astype(np.float16)
    store = write_store(folder, spec, ((7 * n, n, row) for n, row in enumerate(values)))
    assert store.num_shards > 1
    settings = CardSettings(license="mit", repository="me/features")
    write_card(str(folder), settings, folder / "README.md")
    return folder


@pytest.fixture(scope="module")
def environment(folder, tmp_path_factory) -> Iterator[dict[str, str]]:
    """That of a process whose Hub is a played one with the store."""
    hub = PlayedHub()
    hub.repositories["datasets/me/features"] = Repository(folder)
    inherited = {name: value for name, value in os.environ.items() if name[:3] != "HF_"}
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    yield inherited | path | hub.environment(tmp_path_factory.mktemp("home"))
    hub.stop()


def of_card(folder: Path) -> str:
    """The code of the card that uses datasets."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    (code,) = (block for block in blocks if "load_dataset" in block)
    return re.sub(r"\.with_format.*|image_id, features = .*", "", code)


def of_files(folder: Path, *, streaming: bool) -> str:
    files = f"data_files={str(folder / '*.h5')!r}, split='train', streaming={streaming}"
    return f"from datasets import load_dataset\nrows = load_dataset('hdf5', {files})\n"


CASES = {
    "the card's code": lambda folder: of_card(folder) + SAVE,
    "the repository's name": lambda folder: BY_NAME + SAVE,
    "the files of a folder": lambda folder: of_files(folder, streaming=False) + SAVE,
    "the files of a folder, streamed": lambda folder: of_files(folder, streaming=True) + STREAMED,
}


@pytest.mark.parametrize("case", CASES)
def test_datasets_gives_every_row_of_the_store(folder, environment, tmp_path, case):
    code, found = CASES[case](folder), tmp_path / "found.npz"
    done = subprocess.run(
        [sys.executable, "-c", code, found, str(ROWS)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    store = FeatureStore(folder)
    with np.load(found) as arrays:
        assert sorted(arrays["image_id"]) == store.image_ids.tolist()
        assert np.array_equal(arrays["features"], store.gather(arrays["image_id"]))
