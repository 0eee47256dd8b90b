import numpy as np
import pytest

from eval.bootstrap import Measure, divide, mean_of, ratio_of


def test_a_mean_and_a_ratio_are_what_their_names_say():
    assert mean_of([1.0, 2.0, 6.0]).value == 3.0
    assert ratio_of([1.0, 2.0], [4.0, 2.0]).value == 0.5
    assert ratio_of([0.0, 0.0], [0.0, 0.0]).value == 0.0


def test_division_by_nothing_is_nothing():
    assert divide(np.array([3.0, 3.0]), np.array([0.0, 2.0])).tolist() == [0.0, 1.5]


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = mean_of(values.tolist()).interval(range(400), seed=1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_about_95_of_100_intervals_hold_the_truth():
    held = 0
    for seed in range(200):
        values = np.random.default_rng(seed).exponential(1.0, 100)
        low, high = mean_of(values.tolist()).interval(range(100), seed)
        held += low <= 1.0 <= high
    assert 0.88 <= held / 200 <= 0.99


def test_images_are_drawn_with_all_their_texts():
    values, image_ids = [0.0, 1.0] * 50, list(range(100))
    apart = mean_of(values).interval(image_ids, seed=3)
    # The same texts, ten to an image, of which all say the same: ten times fewer observations.
    together = mean_of(sorted(values)).interval([i // 10 for i in image_ids], seed=3)
    assert together[1] - together[0] > 2.5 * (apart[1] - apart[0])
    # Texts that are repeated tell nothing new.
    twice = mean_of(values * 2).interval(image_ids * 2, seed=3)
    assert twice == pytest.approx(apart)


def test_texts_that_all_score_the_same_leave_no_doubt():
    assert mean_of([0.25] * 7).interval([1, 1, 2, 3, 4, 5, 6], seed=0) == [0.25, 0.25]


def test_the_interval_depends_on_the_seed_and_on_no_order_of_images():
    values = [float(i % 7) for i in range(60)]
    ids = [i % 20 for i in range(60)]
    measure = mean_of(values)
    assert measure.interval(ids, 5) == measure.interval(ids, 5)
    assert measure.interval(ids, 5) != measure.interval(ids, 6)
    order = np.random.default_rng(0).permutation(60)
    shuffled = Measure(measure.parts_NK[order], measure.of_sums)
    assert shuffled.interval([ids[n] for n in order], 5) == pytest.approx(measure.interval(ids, 5))
