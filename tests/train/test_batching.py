"""Laws of order, layout and mask; the law of the shared prefix stands in test_shared_prefix.py."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from cache.order import global_order
from train.batching import PADDING, Row, attention_mask, collate, micro_batches, plan_steps
from train.prompts import Branch

SIZES = [5, 1, 5, 2, 7, 1, 1, 3, 5, 4, 6]


def random_rows(seed, count=9):
    rng = np.random.default_rng(seed)
    return [
        Row(
            number,
            tuple(
                Branch(rng.integers(1, 99, length).tolist(), (rng.random(length) < 0.6).tolist())
                for length in rng.integers(1, 7, rng.integers(1, 5))
            ),
        )
        for number in range(count)
    ]


def shuffled(seed, sizes=SIZES):
    return lambda epoch: global_order(len(sizes), seed, epoch)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_every_epoch_holds_every_example_once(batch_size, epochs):
    steps = plan_steps(SIZES, batch_size, epochs, shuffled(3))
    flat = list(itertools.chain(*steps))
    for epoch in range(epochs):
        part = flat[epoch * len(SIZES) : (epoch + 1) * len(SIZES)]
        assert sorted(part) == list(range(len(SIZES)))
    assert len(flat) == epochs * len(SIZES)
    assert all(steps)


def test_order_is_a_function_of_seed_and_epoch():
    def orders(epochs, seed):
        flat = list(itertools.chain(*plan_steps(SIZES, 4, epochs, shuffled(seed))))
        return [tuple(flat[n : n + len(SIZES)]) for n in range(0, len(flat), len(SIZES))]

    np.random.seed(1)
    first = orders(3, 0)
    np.random.seed(2)
    assert orders(3, 0) == first
    assert orders(1, 0) == first[:1], "later epochs do not change earlier ones"
    assert len(set(first) | set(orders(3, 1))) == 6, "epochs and seeds differ"


def test_a_fraction_of_an_epoch_is_the_beginning_of_the_whole():
    whole = list(itertools.chain(*plan_steps(SIZES, 4, 2, shuffled(0))))
    for epochs in (0.5, 1.25, 1.5):
        part = list(itertools.chain(*plan_steps(SIZES, 4, epochs, shuffled(0))))
        assert part == whole[: round(epochs * len(SIZES))]


def test_even_the_smallest_share_of_an_epoch_is_a_step():
    assert len(plan_steps([5, 5], 4, 0.01, shuffled(0, [5, 5]))) == 1


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_each_step_but_the_last_just_reaches_the_batch_size(batch_size):
    steps = plan_steps(SIZES, batch_size, 3, shuffled(0))
    assert len(steps) > 1
    for step in steps[:-1]:
        texts = [SIZES[number] for number in step]
        assert sum(texts) >= batch_size > sum(texts[:-1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_tokens", [1, 20, 40, 10_000])
def test_micro_batches_lose_nothing_and_keep_to_the_budget(seed, max_tokens):
    rows = random_rows(seed)
    parts = list(micro_batches(rows, 4, max_tokens))
    assert Counter(row.image_id for part in parts for row in part) == Counter(range(len(rows)))
    for part in parts:
        assert len(part) == 1 or collate(part, 4).segments.numel() <= max_tokens
    if max_tokens == 10_000:
        assert len(parts) == 1


@pytest.mark.parametrize("seed", range(5))
def test_collate_places_every_token_as_if_its_text_were_alone(seed):
    rows, patches = random_rows(seed), 4
    batch = collate(rows, patches)
    assert batch.image_ids == [row.image_id for row in rows]
    seen = Counter()
    for r, row in enumerate(rows):
        assert batch.positions[r, :patches].tolist() == [0, 1, 2, 3]
        assert batch.segments[r, :patches].tolist() == [0] * patches
        for number, branch in enumerate(row.branches, start=1):
            where = (batch.segments[r] == number).nonzero().flatten()
            assert batch.token_ids[r, where - patches].tolist() == branch.token_ids[:-1]
            wanted = list(range(patches, patches + len(branch.token_ids) - 1))
            assert batch.positions[r, where].tolist() == wanted
            # What predicts token n is the token before it, or the last patch.
            chain = [patches - 1, *where.tolist()]
            for n, token_id in enumerate(branch.token_ids):
                if branch.learned[n]:
                    seen[r, chain[n], token_id] += 1
        padding = (batch.segments[r] == PADDING).sum()
        assert padding == batch.segments.shape[1] - patches - row.num_text_tokens
    found = zip(batch.target_rows, batch.target_positions, batch.targets, strict=True)
    assert Counter((int(r), int(p), int(t)) for r, p, t in found) == seen
    assert (batch.segments != PADDING).any(dim=0)[-1], "no column is padding alone"


def test_rows_without_anything_to_learn_give_no_target():
    batch = collate([Row(1, (Branch([3, 4], [False, False]),))], 4)
    assert batch.targets.shape == batch.target_rows.shape == batch.target_positions.shape == (0,)
    assert batch.targets.dtype == torch.int64


@pytest.mark.parametrize("seed", range(3))
def test_a_position_sees_the_patches_and_its_own_text_up_to_itself(seed):
    segments = collate(random_rows(seed), 4).segments
    mask = attention_mask(segments)
    assert mask.dtype == torch.bool
    assert mask.shape == (len(segments), 1, segments.shape[1], segments.shape[1])
    for r, row in enumerate(segments.tolist()):
        for query, key in itertools.product(range(len(row)), repeat=2):
            visible = key <= query and row[key] in (0, row[query]) and row[key] != PADDING
            assert mask[r, 0, query, key] == (visible or query == key)


def test_moving_a_batch_keeps_all_of_it():
    batch = collate(random_rows(0), 4)
    moved = batch.to(torch.device("meta"))
    assert moved.image_ids == batch.image_ids
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta", name
            assert getattr(moved, name).shape == value.shape
