import numpy as np
import pytest

from cache.errors import CorruptShardError
from cache.files.row_spool import RECORDS, ROWS, RowSpool, intact_rows

PATCHES, WIDTH = 3, 5
ROW_BYTES = PATCHES * WIDTH * 2
IDS = [7, -3, 2**62, 11, 0]


def row_of(image_id, seed=0):
    rng = np.random.default_rng([abs(image_id), seed])
    return rng.standard_normal((PATCHES, WIDTH)).astype("<f2")


def opened(folder):
    return RowSpool(folder, PATCHES, WIDTH)


@pytest.fixture
def folder(tmp_path):
    """A spool of five rows."""
    with opened(tmp_path) as spool:
        for image_id in IDS:
            spool.append(image_id, image_id % 100, row_of(image_id))
    return tmp_path


def held(folder):
    return [row and row[0] for row in intact_rows(folder, ROW_BYTES)]


def test_rows_come_back_in_the_order_asked(folder):
    asked = [0, 7, 2**62, 7]
    with opened(folder) as spool:
        assert np.array_equal(spool.gather(asked), np.stack([row_of(i) for i in asked]))
        image_ids, sources = spool.images()
    assert dict(zip(image_ids.tolist(), sources.tolist(), strict=True)) == {
        image_id: image_id % 100 for image_id in IDS
    }


def test_a_later_row_of_an_image_counts(folder):
    with opened(folder) as spool:
        spool.append(7, 55, row_of(7, seed=1))
        assert spool.source_xxh3(7) == 55
    with opened(folder) as spool:
        assert spool.source_xxh3(7) == 55
        assert np.array_equal(spool.gather([7])[0], row_of(7, seed=1))
        assert len(spool.images()[0]) == len(IDS)


@pytest.mark.parametrize("name", [ROWS, RECORDS])
@pytest.mark.parametrize("num_bytes", [1, 20, 23])
def test_after_a_torn_end_all_whole_rows_are_there_and_more_can_follow(folder, name, num_bytes):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-num_bytes])
    assert held(folder) == IDS[:-1]
    with opened(folder) as spool:
        assert spool.source_xxh3(IDS[-1]) is None
        spool.append(5, 5, row_of(5))
    with opened(folder) as spool:
        assert np.array_equal(spool.gather([11, 5]), np.stack([row_of(11), row_of(5)]))


def test_a_damaged_row_is_missing_and_no_other(folder):
    path = folder / ROWS
    data = bytearray(path.read_bytes())
    data[ROW_BYTES + 4] ^= 1
    path.write_bytes(data)
    assert held(folder) == [7, None, 2**62, 11, 0]
    with opened(folder) as spool:
        assert spool.source_xxh3(-3) is None
        spool.append(-3, 1, row_of(-3))
    with opened(folder) as spool:
        assert np.array_equal(spool.gather(IDS), np.stack([row_of(i) for i in IDS]))


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + b"\x01"])
def test_a_row_that_is_damaged_while_the_spool_is_open_is_an_error(folder, change):
    path = folder / ROWS
    with opened(folder) as spool:
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(CorruptShardError, match=f"{ROWS}: the row of image {IDS[-1]}"):
            spool.gather(IDS)


def test_a_failed_append_leaves_the_rows_as_they_were(folder, monkeypatch):
    with opened(folder) as spool:
        with pytest.raises(AttributeError):
            spool.append(5, 5, None)
        with pytest.raises(OverflowError):
            spool.append(5, -1, row_of(5))
        assert spool.source_xxh3(5) is None
        spool.append(6, 6, row_of(6))
    assert held(folder) == [*IDS, 6]


def test_a_folder_without_a_spool_has_no_rows(tmp_path):
    assert intact_rows(tmp_path, ROW_BYTES) == []
