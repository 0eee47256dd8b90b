import numpy as np
import pytest

from train.data.order import global_order, windowed_order


def shards_of(counts, seed=0):
    """Rows of shards of these sizes, not in order of shard."""
    numbers = np.repeat(np.arange(len(counts)) * 7, counts)
    return np.random.default_rng(seed).permutation(numbers)


COUNTS = [5, 1, 40, 33, 8, 21, 60, 2, 17, 30]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 3, 10, 99])
def test_every_row_comes_once_whatever_the_window(seed, window):
    shards = shards_of(COUNTS)
    order = windowed_order(shards, window, seed, epoch=1)
    assert order.dtype == np.int64
    assert sorted(order) == sorted(global_order(len(shards), seed, 1)) == list(range(len(shards)))


def test_both_are_functions_of_seed_and_epoch_alone():
    shards = shards_of(COUNTS)
    orders = [lambda *p: global_order(len(shards), *p), lambda *p: windowed_order(shards, 3, *p)]
    for order in orders:
        np.random.seed(1)
        first = order(0, 0)
        np.random.seed(2)
        assert np.array_equal(order(0, 0), first)
        drawn = {tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
        assert len(drawn) == 9


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_a_window_is_finished_before_the_next_begins(window):
    shards = shards_of(COUNTS)
    read = shards[windowed_order(shards, window, 0, 0)]
    spans = {n: (np.flatnonzero(read == n)[0], np.flatnonzero(read == n)[-1]) for n in set(read)}
    at_once = [sum(a <= place <= b for a, b in spans.values()) for place in range(len(read))]
    assert max(at_once) <= window
    groups = []
    for number in dict.fromkeys(read.tolist()):
        if not groups or len(groups[-1]) == window:
            groups.append(set())
        groups[-1].add(number)
    assert len(groups) == -(-len(COUNTS) // window)


def test_rows_of_a_window_are_mixed_evenly():
    """The mean place of a shard's rows within a window is the middle, over many epochs."""
    shards = np.repeat([0, 1, 2], 50)
    places = np.zeros(150)
    for epoch in range(400):
        places[windowed_order(shards, 3, 0, epoch)] += np.arange(150)
    assert np.abs(places / 400 - 74.5).max() < 12


def test_shards_come_in_every_order():
    shards = np.arange(4)
    firsts = [int(windowed_order(shards, 1, 0, epoch)[0]) for epoch in range(400)]
    assert np.abs(np.bincount(firsts, minlength=4) - 100).max() < 40


def test_one_window_over_everything_is_an_even_shuffle():
    shards = np.repeat(np.arange(20), 50)
    order = windowed_order(shards, 20, 0, 0)
    neighbours = np.mean(shards[order][1:] == shards[order][:-1])
    assert neighbours == pytest.approx(1 / 20, abs=0.03)
