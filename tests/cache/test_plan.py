import hashlib
import struct

import numpy as np
import pytest
import xxhash

from cache.errors import SettingsError
from cache.plan import check_num_shards, plan_shards

FINGERPRINT = "ab" * 32


def random_set(seed, num_images=2000, low=0, high=600_000):
    rng = np.random.default_rng(seed)
    image_ids = rng.choice(np.arange(low, high), num_images, replace=False)
    return image_ids, rng.integers(0, 2**64, num_images, dtype=np.uint64)


def plan(image_ids, hashes, shard_rows=16, fingerprint=FINGERPRINT):
    return plan_shards(image_ids, hashes, fingerprint, shard_rows)


def keys(shards):
    return {shard.key for shard in shards}


def cut_after(image_id, shard_rows):
    return xxhash.xxh3_64_intdigest(struct.pack("<q", image_id)) % shard_rows == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shard_rows", [1, 2, 7, 64])
def test_every_image_is_in_exactly_one_shard(seed, shard_rows):
    image_ids, hashes = random_set(seed, 500, -1000, 10**6)
    shards = plan(image_ids, hashes, shard_rows)
    order = np.argsort(image_ids)
    assert np.array_equal(np.concatenate([s.image_ids for s in shards]), image_ids[order])
    assert np.array_equal(np.concatenate([s.source_xxh3 for s in shards]), hashes[order])
    assert all(1 <= len(shard.image_ids) <= 2 * shard_rows for shard in shards)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_input_is_irrelevant(seed):
    image_ids, hashes = random_set(seed)
    wanted = [shard.name for shard in plan(image_ids, hashes)]
    shuffled = np.random.default_rng(seed).permutation(len(image_ids))
    assert [shard.name for shard in plan(image_ids[shuffled], hashes[shuffled])] == wanted


@pytest.mark.parametrize("image_ids", [np.arange(3000), np.arange(0, 9_000_000, 3000)])
def test_no_shard_exceeds_twice_the_mean(image_ids):
    sizes = [len(s.image_ids) for s in plan(image_ids, image_ids.astype(np.uint64), 8)]
    # The limit is met, so it is what holds the sizes down.
    assert max(sizes) == 16


@pytest.mark.parametrize("shard_rows", [16, 64])
def test_the_mean_is_near_the_setting(shard_rows):
    image_ids, hashes = random_set(1, 50_000)
    mean = len(image_ids) / len(plan(image_ids, hashes, shard_rows))
    # Of a geometric distribution cut off at twice its mean, 1 - exp(-2) = 86 % is left.
    assert 0.8 * shard_rows < mean < 0.95 * shard_rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shard_rows", [1, 5, 16])
def test_cuts_are_where_the_design_says(seed, shard_rows):
    image_ids, hashes = random_set(seed, 700, -5000, 5000)
    wanted, rows = [], []
    for image_id in sorted(image_ids.tolist()):
        rows.append(image_id)
        if cut_after(image_id, shard_rows) or len(rows) == 2 * shard_rows:
            wanted.append(rows)
            rows = []
    wanted += [rows] if rows else []
    assert [s.image_ids.tolist() for s in plan(image_ids, hashes, shard_rows)] == wanted


@pytest.mark.parametrize("seed", range(3))
def test_the_key_is_the_one_of_the_design(seed):
    image_ids, hashes = random_set(seed, 300, -(10**6), 10**6)
    for shard in plan(image_ids, hashes):
        text = FINGERPRINT.encode()
        for image_id, source in zip(
            shard.image_ids.tolist(), shard.source_xxh3.tolist(), strict=True
        ):
            text += struct.pack("<qQ", image_id, source)
        assert shard.key == hashlib.sha256(text).hexdigest()[:16]
        assert shard.name == f"{shard.key}.h5"


def changed_by(image_ids, hashes, position, shard_rows):
    """Keys gone and keys new when one image is taken out of a set."""
    before = keys(plan(image_ids, hashes, shard_rows))
    keep = np.arange(len(image_ids)) != position
    after = keys(plan(image_ids[keep], hashes[keep], shard_rows))
    return len(before - after), len(after - before)


def test_adding_or_removing_an_image_nearly_always_changes_one_or_two_shards():
    image_ids, hashes = random_set(7, 1000)
    order = np.argsort(image_ids)
    image_ids, hashes = image_ids[order], hashes[order]
    # Taking an image out and adding it are the same change seen from its two ends.
    changes = [changed_by(image_ids, hashes, n, 16) for n in range(0, 1000, 7)]
    assert len(changes) > 100
    assert np.mean([max(change) <= 2 for change in changes]) > 0.9
    assert np.mean([max(change) for change in changes]) < 2


def test_a_change_reaches_no_further_than_the_next_cut():
    image_ids, hashes = random_set(8, 1000)
    order = np.argsort(image_ids)
    image_ids, hashes = image_ids[order], hashes[order]
    before = plan(image_ids, hashes)
    for position in range(3, 1000, 71):
        keep = np.arange(1000) != position
        after = keys(plan(image_ids[keep], hashes[keep]))
        removed = image_ids[position]
        later = image_ids[image_ids > removed]
        next_cut = next((i for i in later.tolist() if cut_after(i, 16)), image_ids[-1])
        for shard in before:
            if shard.image_ids[-1] < removed or shard.image_ids[0] > next_cut:
                assert shard.key in after
            elif removed in shard.image_ids:
                assert shard.key not in after


def test_a_changed_image_changes_exactly_its_own_key():
    image_ids, hashes = random_set(9)
    before = plan(image_ids, hashes)
    for position in range(0, 2000, 97):
        changed = hashes.copy()
        changed[position] ^= np.uint64(1)
        after = plan(image_ids, changed)
        differing = [old for old, new in zip(before, after, strict=True) if old.key != new.key]
        assert [image_ids[position] in shard.image_ids for shard in differing] == [True]


def test_another_encoder_changes_every_key():
    image_ids, hashes = random_set(10)
    before = plan(image_ids, hashes)
    after = plan(image_ids, hashes, fingerprint="cd" * 32)
    assert not keys(before) & keys(after)
    assert [len(s.image_ids) for s in before] == [len(s.image_ids) for s in after]


def test_no_images_make_no_shards():
    assert plan(np.empty(0, np.int64), np.empty(0, np.uint64)) == []


def test_a_plan_of_more_shards_than_an_index_lists_is_refused(monkeypatch):
    monkeypatch.setattr("cache.plan.MAX_SHARDS", 100)
    found = plan(*random_set(0), shard_rows=8)
    assert len(found) > 200
    with pytest.raises(SettingsError, match=r"shard_rows is 8, .* at most 100 .* to 24 or more"):
        check_num_shards(found, 8)
    check_num_shards(plan(*random_set(0), shard_rows=64), 64)
