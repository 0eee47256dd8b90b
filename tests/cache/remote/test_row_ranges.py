"""Requests hold whole runs of missing rows of one shard, none too large, none twice."""

import numpy as np
import pytest

from cache.remote import row_ranges
from cache.remote.row_ranges import RowRanges
from cache.remote.row_states import PENDING, READY, UNKNOWN, RowStates

STARTS, NUM_ROWS = [0, 20, 32], [17, 12, 40]
"""Three shards: the rows of each begin at a multiple of something, so that some do not exist."""
ROW_BYTES = 10


@pytest.fixture(params=[0, 1, 2], ids="seed {}".format)
def rng(request):
    return np.random.default_rng(request.param)


@pytest.fixture
def states(rng):
    made = RowStates(72, np.array(STARTS), NUM_ROWS, lambda number: None)
    made.of_row[:] = rng.choice([UNKNOWN, PENDING, READY], 72, p=[0.8, 0.1, 0.1])
    return made


@pytest.fixture
def missing(rng, states):
    existing = np.concatenate([start + np.arange(n) for start, n in zip(STARTS, NUM_ROWS)])  # noqa: B905
    chosen = np.sort(rng.choice(existing, 20, replace=False))
    return chosen[states.of_row[chosen] == UNKNOWN]


@pytest.mark.parametrize("request_bytes", [5, 30, 1000])
@pytest.mark.parametrize("gap_bytes", [0, 20])
def test_ranges_hold_each_row_once_and_only_missing_ones(
    states, missing, monkeypatch, request_bytes, gap_bytes
):
    monkeypatch.setattr(row_ranges, "REQUEST_BYTES", request_bytes)
    monkeypatch.setattr(row_ranges, "GAP_BYTES", gap_bytes)
    ranges = RowRanges(states, ROW_BYTES).joined(missing)
    held = [row for run in ranges for row in range(run.start, run.stop)]
    assert len(held) == len(set(held))
    assert set(missing.tolist()) <= set(held)
    assert not states.of_row[held].any()
    for run in ranges:
        assert len(np.unique(states.numbers_of(np.arange(run.start, run.stop)))) == 1
        assert run.stop - run.start <= max(1, request_bytes // ROW_BYTES)
        within = missing[(missing >= run.start) & (missing < run.stop)]
        assert np.diff(within).max(initial=1) - 1 <= gap_bytes // ROW_BYTES


def test_a_row_of_a_shard_that_is_fetched_whole_brings_the_missing_rows_of_its_request(
    states, missing, monkeypatch
):
    monkeypatch.setattr(row_ranges, "REQUEST_BYTES", 5 * ROW_BYTES)
    states.is_ahead[:] = [True, False, True]
    wanted = RowRanges(states, ROW_BYTES).with_whole_requests(missing)
    expected = set(missing.tolist())
    for row in missing.tolist():
        number = int(states.numbers_of(np.array([row]))[0])
        if states.is_ahead[number]:
            first = (row - STARTS[number]) // 5 * 5
            stop = min(first + 5, NUM_ROWS[number])
            around = STARTS[number] + np.arange(first, stop)
            expected |= set(around[states.of_row[around] == UNKNOWN].tolist())
    assert wanted.tolist() == sorted(expected)
    assert len(expected) > len(missing)


def test_no_rows_need_no_request(states):
    ranges = RowRanges(states, ROW_BYTES)
    none = np.array([], np.int64)
    assert ranges.joined(none) == []
    assert ranges.with_whole_requests(none).tolist() == []
