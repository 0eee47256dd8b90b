"""Damage, `python -m cache.verify --repair`, and the extract stage again: the same bytes."""

import contextlib

import numpy as np
import pytest

from cache.audit import audit
from cache.errors import CorruptShardError
from cache.remote.location import Location
from cache.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.slow("repairs a store under DVC"),
]

PLACES = 6
"""Bits flipped in each file."""


def flip(path, place):
    """Damage a file where it lies: what is linked to it is damaged too."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << place % 8
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(data)


@pytest.mark.parametrize("kind", ["spec.json", "index.parquet", "probe.safetensors", "shard"])
def test_a_flipped_bit_is_found_dropped_and_made_again(workspace, wanted, kind):
    workspace.run()
    names = sorted(wanted)
    rng = np.random.default_rng(len(kind))
    for number in range(PLACES):
        name = kind if kind in wanted else [n for n in names if n.endswith(".h5")][number]
        flip(workspace.features / name, int(rng.integers(len(wanted[name]))))
        with pytest.raises(CorruptShardError, match="problems: 1, files deleted: 1"):
            verify(str(workspace.features), deep=True, repair=True)
        assert set(workspace.store_bytes()) == set(wanted) - {name}
        report = workspace.run(write=False)
        assert report["shards_encoded"] == (kind == "shard")
        assert workspace.store_bytes() == wanted
        assert audit(Location(workspace.features), deep=True).ok


def test_several_damaged_files_are_repaired_at_once(workspace, wanted):
    workspace.run()
    shards = sorted(name for name in wanted if name.endswith(".h5"))
    for name in shards[:3]:
        flip(workspace.features / name, 5000)
    (workspace.features / shards[4]).unlink()
    with contextlib.suppress(CorruptShardError):
        verify(str(workspace.features), deep=True, repair=True)
    assert workspace.run(write=False)["shards_encoded"] == 3
    assert workspace.store_bytes() == wanted
