"""Laws of a training setup: its plan over the store's images, and its prefetched steps."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from train.data.examples import Example
from train.data.order import global_order, windowed_order
from train.data.prompts import caption_turns
from train.data.schedule import plan_steps
from train.loop.step import StepData

EXAMPLES = [
    Example(n, tuple(caption_turns(c) for c in ("a red cat", "the dog", "blue", "is")[: 1 + n % 4]))
    for n in range(100, 140)
]
TEXTS = sum(len(example.texts) for example in EXAMPLES)


@pytest.fixture
def setup(make_setup, settings):
    def setup(examples=EXAMPLES, *, batch_size=8, seed=0, **changes):
        return make_setup(examples, batch_size=batch_size, seed=seed, settings=settings(**changes))

    return setup


def planned(steps):
    return [(step.image_numbers.tolist(), step.texts) for step in steps]


def assert_equal(found, wanted):
    """Compare the data of two steps: all of it, bit by bit."""
    assert len(found.batches) == len(wanted.batches)
    for one, other in zip(found.batches, wanted.batches, strict=True):
        assert one.number == other.number
        assert torch.equal(one.patches_NPD, other.patches_NPD)
        assert np.array_equal(one.image_ids, other.image_ids)
        for name, value in vars(one).items():
            if torch.is_tensor(value):
                assert torch.equal(value, getattr(other, name)), name
    counts = ("image_ids", "num_target_tokens", "num_positions", "num_slots", "num_cut")
    assert all(getattr(found, name) == getattr(wanted, name) for name in counts)


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_the_plan_is_that_of_the_settings(setup, order):
    made = setup(batch_size=6, seed=5, texts_per_image=2, epochs=1.5, order=order, window_shards=1)
    shards = made.store.shards_of(made.train.image_ids)
    orders = {
        "global": lambda number: global_order(len(EXAMPLES), 5, number),
        "windowed": lambda number: windowed_order(shards, 1, 5, number),
    }
    wanted = plan_steps(
        np.array([len(example.texts) for example in EXAMPLES]),
        batch_size=6,
        texts_per_image=2,
        epochs=1.5,
        order=orders[order],
    )
    assert len(wanted) > 10
    assert planned(made.plan()) == planned(wanted)


def test_the_windowed_order_stays_in_its_window(setup):
    made = setup(texts_per_image=4, order="windowed", window_shards=1)
    numbers = np.concatenate([step.image_numbers for step in made.plan()])
    shards = made.store.shards_of(made.train.image_ids)[numbers]
    assert len(set(shards.tolist())) == 2
    assert np.count_nonzero(np.diff(shards)) == 1


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_the_data_of_each_step_are_those_of_its_plan(setup, order):
    made = setup(texts_per_image=2, order=order)
    steps = made.plan()
    found = list(made.prefetch(steps, 0))
    assert len(found) == len(steps)
    for step, data in zip(steps, found, strict=True):
        chosen = [EXAMPLES[number] for number in step.image_numbers]
        part = [Example(e.image_id, e.texts[step.texts]) for e in chosen]
        assert data.image_ids == [example.image_id for example in part]
        assert_equal(data, made.step_data(part))


def test_an_epoch_reads_every_token_of_every_text_once(setup):
    made = setup(texts_per_image=3)
    whole = made.step_data(EXAMPLES)
    wanted = Counter(itertools.chain(*(one.target_ids.tolist() for one in whole.batches)))
    found = Counter()
    for data in made.prefetch(made.plan(), 0):
        found.update(itertools.chain(*(one.target_ids.tolist() for one in data.batches)))
    assert found == wanted
    assert sum(wanted.values()) > TEXTS


@pytest.mark.parametrize("order", ["global", "windowed"])
def test_who_begins_in_the_middle_gets_what_would_have_come(setup, order):
    made = setup(texts_per_image=2, order=order, window_shards=1)
    steps = made.plan()
    whole = list(made.prefetch(steps, 0))
    for start in (1, len(steps) // 2, len(steps) - 1, len(steps)):
        rest = list(made.prefetch(steps, start))
        assert len(rest) == len(whole) - start
        for found, wanted in zip(rest, whole[start:], strict=True):
            assert_equal(found, wanted)


def test_a_pass_keeps_to_the_settings(setup):
    for pass_tokens, row_tokens in ((40, 40), (200, 60), (200, 200)):
        made = setup(texts_per_image=4, micro_batch_tokens=pass_tokens, row_tokens=row_tokens)
        data = made.step_data(EXAMPLES)
        shapes = [one.token_ids.shape for one in data.batches]
        assert len(shapes) > 1
        assert all(rows * width <= pass_tokens for rows, width in shapes)
        assert all(width <= row_tokens for _, width in shapes)
    long = setup(max_text_tokens=2).step_data(EXAMPLES)
    assert long.num_cut > 0
    assert long.num_positions <= len(EXAMPLES) * 4 + TEXTS


@pytest.mark.parametrize(("order", "asks"), [("global", False), ("windowed", True)])
def test_shards_are_read_ahead_in_the_windowed_order_only(setup, monkeypatch, order, asks):
    made = setup(batch_size=1, texts_per_image=4, order=order, window_shards=1)
    asked = []
    monkeypatch.setattr(type(made.store), "read_ahead", lambda store, shards: asked.extend(shards))
    seen = [image_id for data in made.prefetch(made.plan(), 0) for image_id in data.image_ids]
    assert sorted(seen) == [example.image_id for example in EXAMPLES]
    visited = made.store.shards_of(np.array(seen)).tolist()
    assert asked == (list(dict.fromkeys(visited)) if asks else [])


def test_the_next_window_is_asked_for_before_this_one_ends(setup, monkeypatch):
    made = setup(batch_size=1, texts_per_image=4, order="windowed", window_shards=1)
    steps = made.plan()
    events = []
    monkeypatch.setattr(type(made.store), "read_ahead", lambda store, shards: events.extend(shards))
    build = type(made).step_data
    monkeypatch.setattr(
        type(made), "step_data", lambda setup, part: events.append("step") or build(setup, part)
    )
    assert all(isinstance(data, StepData) for data in made.prefetch(steps, 0))
    first, second = (n for n, event in enumerate(events) if event != "step")
    # A window has twenty images here, and as many steps: it is known that far ahead.
    assert first == 0
    assert second < len(steps) / 2
