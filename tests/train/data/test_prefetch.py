import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from cache import FeatureStore
from cache.errors import MissingImageError
from train.data.prefetch import (
    BATCHES_AHEAD,
    DEPTH,
    FeatureBatches,
    Prefetcher,
    ShardReadahead,
    gather_tensor,
)

CPU = torch.device("cpu")


def random_batches(store, count=9, size=5):
    return list(np.random.default_rng(0).choice(store.image_ids, (count, size)))


# What is made ahead


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
def test_everything_comes_once_and_in_order(count):
    assert list(Prefetcher(lambda n: n * n, range(count))) == [n * n for n in range(count)]


def test_items_are_made_in_another_thread_while_one_is_used():
    made, threads = [], set()

    def make(number):
        threads.add(threading.get_ident())
        made.append(number)
        return number

    for number in Prefetcher(make, range(10)):
        until = time.monotonic() + 10
        while len(made) < min(10, number + 1 + DEPTH) and time.monotonic() < until:
            time.sleep(0.001)
        assert made == list(range(min(10, number + 1 + DEPTH)))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_error_comes_where_its_item_would_have_come():
    def make(number):
        return 1 // (3 - number)

    got = []
    items = map(got.append, Prefetcher(make, range(9)))
    with pytest.raises(ZeroDivisionError):
        list(items)
    assert got == [0, 0, 1]


def test_who_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    for _ in Prefetcher(lambda number: number, range(100)):
        break
    source = iter(Prefetcher(lambda number: number, range(100)))
    next(source)
    source.close()
    assert threading.active_count() == before


def test_waiting_is_counted_from_the_second_item_on():
    def slow(number):
        time.sleep(0.02)
        return number

    source = Prefetcher(slow, range(6))
    for _ in source:
        assert source.last_wait >= 0
    assert 0.5 < source.wait_share <= 1
    assert source.waited <= source.elapsed
    fast = Prefetcher(lambda number: number, range(6))
    for _ in fast:
        time.sleep(0.02)
    assert fast.wait_share < 0.5
    assert Prefetcher(slow, []).wait_share == 0


def test_the_share_is_right_while_items_are_used():
    def slow(number):
        time.sleep(0.02)
        return number

    source = Prefetcher(slow, range(4))
    assert all(0 <= source.wait_share <= 1 for _ in source)


# Features


def test_batches_are_what_gather_gives(store):
    batches = random_batches(store)
    source = FeatureBatches(store, batches, CPU)
    found = list(source)
    assert len(found) == len(batches)
    for image_ids, features_BPD in zip(batches, found, strict=True):
        assert features_BPD.dtype == torch.float16
        assert np.array_equal(features_BPD.numpy(), store.gather(image_ids))
    assert 0 <= source.wait_share <= 1


def test_a_batch_that_is_kept_does_not_change(store):
    batches = random_batches(store, 20)
    kept = [(features, features.clone()) for features in FeatureBatches(store, batches, CPU)]
    assert all(torch.equal(features, copy) for features, copy in kept)


def test_a_missing_image_stops_the_source(store):
    batches = [*random_batches(store, 3), np.array([-1])]
    with pytest.raises(MissingImageError):
        list(FeatureBatches(store, batches, CPU))


def test_a_tensor_for_the_main_memory_is_not_pinned(store):
    assert not gather_tensor(store, store.image_ids[:3], CPU).is_pinned()


# Shards ahead of their rows


class Recorded:
    """A store of four shards of ten images that notes what is asked of it."""

    def __init__(self):
        self.asked, self.rows = [], []

    def shards_of(self, image_ids):
        return np.asarray(image_ids) // 10

    def read_ahead(self, shards):
        self.asked += shards

    def prefetch_rows(self, image_ids):
        self.rows.append(image_ids.tolist())


def test_shards_are_asked_for_once_and_some_batches_before_their_use():
    store = Recorded()
    batches = [np.arange(start, start + 5) for start in range(0, 40, 5)]
    ahead = ShardReadahead(store, batches, 4)
    known = []
    for number in range(len(batches)):
        ahead.advance_to(number)
        known.append(list(store.asked))
    assert known[:3] == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert known[-1] == [0, 1, 2, 3]


def test_a_shard_of_the_next_epoch_is_asked_for_again():
    store = Recorded()
    ahead = ShardReadahead(store, [np.array([number % 4 * 10]) for number in range(12)], 1)
    for number in range(12):
        ahead.advance_to(number)
    assert store.asked == [0, 1, 2, 3] * 3


def test_without_a_distance_the_rows_of_the_next_batches_are_asked_for_once():
    store = Recorded()
    batches = [np.array([number, number + 1]) for number in range(20)]
    ahead = ShardReadahead(store, batches, 0)
    known = []
    for number in range(len(batches)):
        ahead.advance_to(number)
        known.append(len(store.rows))
    whole = np.concatenate(batches).tolist()
    assert store.asked == []
    # After the first ones, the store learns of all.
    assert store.rows[BATCHES_AHEAD] == whole
    store.rows.remove(whole)
    assert store.rows == [batch.tolist() for batch in batches]
    assert known == [min(number + BATCHES_AHEAD, 20) + 1 for number in range(20)]


def test_no_batches_ask_for_nothing():
    store = Recorded()
    ShardReadahead(store, [], 0).advance_to(0)
    assert store.rows == store.asked == []


@pytest.mark.parametrize("distance", [0, 3])
def test_a_store_behind_a_url_gives_the_same_batches(store, tmp_path, distance):
    batches = random_batches(store)
    remote = FeatureStore(Path(store.root).absolute().as_uri(), cache_dir=tmp_path / "shards")
    plain = list(FeatureBatches(store, batches, CPU))
    far = list(FeatureBatches(remote, batches, CPU, read_ahead=distance))
    assert all(torch.equal(a, b) for a, b in zip(plain, far, strict=True))


def test_reading_ahead_changes_no_feature(store):
    batches = random_batches(store)
    plain = list(FeatureBatches(store, batches, CPU))
    ahead = list(FeatureBatches(FeatureStore(store.root), batches, CPU, read_ahead=3))
    assert all(torch.equal(a, b) for a, b in zip(plain, ahead, strict=True))


# Workers and threads at once


class Gathered(torch.utils.data.Dataset):
    def __init__(self, store, batches):
        self.store, self.batches = store, batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, number):
        return self.store.gather(self.batches[number])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_four_forked_workers_and_eight_threads_read_the_same_at_once(store):
    batches = random_batches(store, 40, 30)
    wanted = [store.gather(image_ids) for image_ids in batches]
    fresh = FeatureStore(store.root)
    loader = torch.utils.data.DataLoader(
        Gathered(fresh, batches), batch_size=None, num_workers=4, multiprocessing_context="fork"
    )
    with ThreadPoolExecutor(8) as threads:
        in_threads = threads.map(fresh.gather, batches * 8)
        for features_BPD, expected in zip(loader, wanted, strict=True):
            assert np.array_equal(features_BPD.numpy(), expected)
        for found, expected in zip(in_threads, wanted * 8, strict=True):
            assert np.array_equal(found, expected)


def test_a_source_can_be_iterated_again(store, monkeypatch):
    asked = []
    monkeypatch.setattr(FeatureStore, "read_ahead", lambda store, shards: asked.append(shards))
    batches = random_batches(store)
    source = FeatureBatches(store, batches, CPU, read_ahead=2)
    first, asked_first = list(source), list(asked)
    second = list(source)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert asked == asked_first * 2


def test_mappings_go_with_the_source_at_once(store):
    """Mapped pages cannot leave the page cache; nobody should have to wait for the collector."""
    gc.disable()
    try:
        opened = FeatureStore(store.root)
        source = FeatureBatches(opened, random_batches(store), CPU)
        list(source)
        reference = weakref.ref(opened)
        del opened, source
        assert reference() is None
    finally:
        gc.enable()
