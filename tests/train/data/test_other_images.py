"""Laws of the pairs of images, and of the view that gives each the features of its pair."""

import numpy as np
import pytest

from cache import FeatureStore
from train.data.other_images import OtherImages, derangement
from workspace.errors import StageError

TRAIN, VALIDATION = np.arange(100, 112), np.arange(112, 119)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [0, 2, 3, 7, 100])
def test_every_image_gets_another_one_and_each_is_given_once(count, seed):
    image_ids = np.random.default_rng(seed).choice(10**12, count, replace=False)
    pairs = derangement(image_ids, seed)
    assert set(pairs) == set(pairs.values()) == set(image_ids.tolist())
    assert all(image_id != other for image_id, other in pairs.items())


def test_the_pairs_depend_on_the_images_and_the_seed_not_on_their_order():
    image_ids = np.arange(50)
    pairs = derangement(image_ids, 3)
    shuffled = np.random.default_rng(0).permutation(np.repeat(image_ids, 2))
    assert derangement(shuffled, 3) == pairs
    assert derangement(image_ids, 4) != pairs
    # The neighbour in the list, or in the order of an epoch, would be another image too.
    assert len({other - image_id for image_id, other in pairs.items()}) > 10


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_the_pairs_are_not_those_of_the_order_of_an_epoch(seed):
    from train.data.order import global_order

    pairs = derangement(np.arange(50), seed)
    for epoch in range(3):
        order = global_order(50, seed, epoch).tolist()
        assert sum(pairs[a] == b for a, b in zip(order, order[1:], strict=False)) < 10


def test_a_single_image_has_no_other():
    with pytest.raises(StageError, match=r"controls.trained_blind: image 7 is the only one"):
        derangement(np.array([7, 7]), 0)


def test_a_view_gives_the_features_of_other_images_of_the_same_split(store):
    view = OtherImages(store, TRAIN, VALIDATION, seed=0)
    for image_ids in (TRAIN, VALIDATION):
        found, own = view.gather(image_ids[::-1]), store.gather(image_ids[::-1])
        assert not any(np.array_equal(*pair) for pair in zip(found, own, strict=True))
        assert {row.tobytes() for row in found} == {row.tobytes() for row in own}
    wanted = np.stack([view.gather([image_id])[0] for image_id in TRAIN])
    out = np.empty_like(wanted)
    assert view.gather(TRAIN, out) is out
    assert np.array_equal(out, wanted)


def test_a_view_keeps_the_pairs_whatever_is_validated(store):
    view = OtherImages(store, TRAIN, VALIDATION, seed=0)
    other = OtherImages(store, TRAIN, VALIDATION[:0], seed=0)
    assert np.array_equal(view.gather(TRAIN), other.gather(TRAIN))


def test_images_of_both_splits_and_a_single_image_of_validation_have_others(store):
    alone = OtherImages(store, TRAIN, np.array([100, 112]), seed=0)
    found = alone.gather(np.array([100, 112]))
    own = store.gather(np.array([100, 112]))
    assert not any(np.array_equal(*pair) for pair in zip(found, own, strict=True))


def test_a_view_has_the_shards_of_the_images_themselves(store):
    view = OtherImages(store, TRAIN, VALIDATION, seed=0)
    both = np.concatenate([TRAIN, VALIDATION])
    assert np.array_equal(view.shards_of(both), store.shards_of(both))
    assert (view.root, view.spec, view.num_shards) == (store.root, store.spec, store.num_shards)


def test_a_view_requests_no_shard_ahead(store, monkeypatch):
    monkeypatch.setattr(FeatureStore, "read_ahead", lambda *_: pytest.fail("reads for nothing"))
    OtherImages(store, TRAIN, VALIDATION, seed=0).read_ahead([0])


@pytest.mark.parametrize("is_remote", [False, True])
def test_a_view_fetches_the_rows_of_the_other_images_from_a_url_alone(
    store, monkeypatch, is_remote
):
    asked = []
    monkeypatch.setattr(FeatureStore, "is_remote", is_remote)
    monkeypatch.setattr(FeatureStore, "prefetch_rows", lambda store, ids: asked.extend(ids))
    view = OtherImages(store, TRAIN, VALIDATION, seed=0)
    view.prefetch_rows(TRAIN[:3])
    assert asked == [view._others[image_id] for image_id in TRAIN[:3].tolist()] * is_remote
