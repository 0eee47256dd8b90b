import io

import numpy as np

from cache.files.sparse import SparseFile


def test_it_holds_what_a_file_in_memory_holds():
    """Seeks, writes and a cut, in any order and over one another."""
    rng = np.random.default_rng(0)
    sparse, plain = SparseFile(), io.BytesIO()
    for _ in range(40):
        place, data = int(rng.integers(1500)), rng.bytes(int(rng.integers(200)))
        ends = []
        for file in (sparse, plain):
            assert file.seek(place) == place
            assert file.write(data) == len(data)
            assert file.tell() == place + len(data)
            ends.append(file.seek(0, io.SEEK_END))
        assert ends[0] == ends[1]
    for file in (sparse, plain):
        file.truncate(1000)
    assert sparse.between(0) == plain.getvalue()
    for start, stop in rng.integers(0, 1001, (50, 2)):
        if start <= stop:
            assert sparse.between(int(start), int(stop)) == plain.getvalue()[start:stop]


def test_zeros_stand_where_nothing_was_written():
    file = SparseFile()
    file.seek(2**40)
    file.write(b"x")
    assert file.between(2**40 - 3) == b"\0\0\0x"
    assert file.seek(-1, io.SEEK_CUR) == 2**40
    file.truncate()
    assert file.between(2**40 - 3) == b"\0\0\0"
