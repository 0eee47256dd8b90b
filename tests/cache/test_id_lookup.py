import numpy as np
import pytest

from cache.id_lookup import MAX_SPREAD, UNKNOWN, IdLookup

INT64 = np.iinfo(np.int64)

SETS = {
    "none": [],
    "one": [7],
    "dense": list(range(100, 200)),
    "with gaps": [3, 4, 8, 9, 10, 17, 21, 22, 30],
    "negative": [-9, -8, -5, 0, 1],
    "sparse": [-(2**40), -5, 0, 3, 2**40],
    "smallest": [INT64.min, INT64.min + 1, INT64.min + 5],
    "largest": [INT64.max - 5, INT64.max - 1, INT64.max],
    "everything": [INT64.min, -1, 0, INT64.max],
}


@pytest.mark.parametrize("name", SETS)
def test_every_id_is_found_and_no_other(name):
    ids = SETS[name]
    rows = [(7 * number) % 11 for number in range(len(ids))]
    lookup = IdLookup(np.array(ids, np.int64), np.array(rows, np.int64))
    near = {i + step for i in ids for step in (-2, -1, 0, 1, 2)} | {0, INT64.min, INT64.max, 2**41}
    asked = [i for i in near if INT64.min <= i <= INT64.max]
    found = lookup.rows_of(np.array(asked, np.int64))
    assert found.tolist() == [rows[ids.index(i)] if i in ids else UNKNOWN for i in asked]


@pytest.mark.parametrize("spread", [1, MAX_SPREAD - 1, MAX_SPREAD + 1, 1000])
def test_dense_and_sparse_ids_are_found_alike(spread):
    rng = np.random.default_rng(spread)
    ids = np.sort(rng.choice(500 * spread, 500, replace=False))
    asked = rng.integers(-5, 500 * spread + 5, 5000)
    is_there = np.isin(asked, ids)
    for rows in (rng.permutation(500), rng.permutation(500) + 2**40):
        found = IdLookup(ids, rows).rows_of(asked)
        assert np.array_equal(found != UNKNOWN, is_there)
        assert np.array_equal(found[is_there], rows[np.searchsorted(ids, asked[is_there])])


def test_the_table_is_bounded_by_the_number_of_ids():
    for spread in (MAX_SPREAD - 1, MAX_SPREAD, 10**9):
        lookup = IdLookup(np.arange(1000) * spread, np.arange(1000))
        size = 0 if lookup._table is None else lookup._table.nbytes
        assert size <= 4 * (MAX_SPREAD * 1000 + 1)
        assert (size > 0) == (spread <= MAX_SPREAD)
