"""No tree of an HDF5 file is followed; the files are opened in another process, as HDF5 crashes."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from cache.files.object_headers import find_tree
from cache.shard import write_shard

ROOT = Path(__file__).parents[3]

OPEN = """
import sys, time
from pathlib import Path
from cache.errors import UnsafeShardError
from cache.shard import open_shard
from cache.spec import Spec
spec = Spec.from_json(Path(sys.argv[1]).read_bytes(), "spec")
for path in sys.argv[2:]:
    started = time.perf_counter()
    try:
        open_shard(Path(path), spec)
        print("opened")
    except UnsafeShardError as error:
        # Not ru_maxrss, which begins with that of the process that started this one.
        peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        print(f"{time.perf_counter() - started} {peak} {error}")
"""

NEW, OLD = {"libver": ("v110", "v110")}, {"libver": ("earliest", "v110")}


@pytest.fixture
def shard(tmp_path, spec, make_rows):
    write_shard(tmp_path / "shard.h5", spec, np.arange(3), make_rows(3))
    return tmp_path / "shard.h5"


def write_bombs(folder, shard):
    data = shard.read_bytes()

    def changed(name, change, **options):
        with h5py.File(folder / name, "w", **options) as file, h5py.File(shard) as source:
            for key in source:
                source.copy(key, file)
            file.attrs.update(source.attrs)
            change(file)
        return folder / name

    def link(file, names):
        for name in names:
            file[name] = h5py.SoftLink("/x")

    def nest(file):
        del file["features"]
        group = file.create_group("features")
        for _ in range(2000):
            group = group.create_group("a")

    changed("many_links", lambda file: link(file, map(str, range(20_000))), **NEW)
    changed("many_attributes", lambda f: f.attrs.update(dict.fromkeys("abcdefghijk", 1)), **NEW)
    changed("a_long_attribute", lambda f: f.attrs.update(spec=np.zeros(10**7, "u1")), **NEW)
    changed("long_names", lambda file: link(file, [c * 60_000 for c in "abc"]), **NEW)
    changed("deep_groups", nest, **NEW)
    old = changed("an_old_group", lambda file: link(file, map(str, range(3000))), **OLD)
    tree = old.read_bytes()
    root = tree.index(b"TREE")
    level, used = tree[root + 5], struct.unpack("<H", tree[root + 6 : root + 8])[0]
    assert level
    for name, child in (("a_loop", 0), ("a_loop_at_the_end", used - 1)):
        loop = bytearray(tree)
        # Signature and counts, siblings, then keys and children in turn.
        place = root + 24 + 8 + 16 * child
        loop[place : place + 8] = struct.pack("<Q", root)
        (folder / name).write_bytes(loop)
    assert find_tree(shard) is None
    assert shard.read_bytes() == data


def test_a_bomb_is_refused_within_ten_seconds_and_two_gigabytes(tmp_path, spec, shard):
    (tmp_path / "bombs").mkdir()
    write_bombs(tmp_path / "bombs", shard)
    (tmp_path / "spec.json").write_bytes(spec.to_json())
    paths = sorted((tmp_path / "bombs").iterdir())
    done = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path / "spec.json", *paths],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert line != "opened", path.name
        seconds, peak, error = line.split(" ", 2)
        assert float(seconds) < 10, path.name
        assert int(peak) < 2 << 20, path.name
        assert len(error) < 1000, path.name


def test_a_header_that_goes_on_in_itself_ends(shard):
    data = bytearray(shard.read_bytes())
    root = int.from_bytes(data[36:44], "little")
    size = 1 << (data[root + 5] & 3)
    first = root + 6 + size
    # The first message becomes a continuation: of the header's own messages.
    data[first] = 0x10
    length = int.from_bytes(data[first + 1 : first + 3], "little")
    assert length >= 16
    data[first + 4 : first + 20] = struct.pack("<QQ", first - 4, 4 + length + 8)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="more than 64 parts"):
        find_tree(shard)


def test_a_file_that_is_not_hdf5_is_not_examined(tmp_path):
    for content in (b"", b"x" * 100, b"PAR1"):
        (tmp_path / "file").write_bytes(content)
        assert find_tree(tmp_path / "file") is None
