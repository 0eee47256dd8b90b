"""The gain of one score over another one of the same texts."""

import math

import numpy as np
import pytest

import eval.bootstrap
from eval.bootstrap import DRAWS, Gain, Measure, mean_of, ratio_of

SCORES = [
    0.7, 0.4, 0.5, -0.1, 1.1, 0.9, 0.5, 0.8, 0.7, 0.4, 0.9, 0.5, 0.5, 0.4, 0.7, 0.6, 0.8, 0.4, 0.6,
    0.3, 0.9, 0.7, 0.7, 0.7, 0.3, 0.8, 1.2, 0.1, 0.1, 0.1, 0.9, 0.6, 0.9, 0.8, 0.7, 0.7, 0.5, 0.9,
    0.3, 0.5,
]  # fmt: skip
OTHERS = [
    0.6, 0.9, 0.3, -0.1, 0.6, 0.9, 0.4, 1.0, 0.1, 0.7, 0.9, 0.1, 0.5, 0.7, 0.6, 0.8, 1.2, 0.5, 0.4,
    0.2, 0.8, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4, -0.3, 0.6, 0.3, 1.0, 0.5, 0.5, 0.7, 0.6, 0.3, 0.2, 1.1,
    0.5, 0.6,
]  # fmt: skip


def gain(values, others, image_ids=None, seed=0):
    image_ids = range(len(values)) if image_ids is None else image_ids
    return mean_of(values).gain_over(mean_of(others), image_ids, seed)


def test_two_images_solved_by_hand(monkeypatch):
    # All draws of two images: one of them twice, or both. Differences 3 and -1.
    draws_RG = np.array([[2.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    monkeypatch.setattr(eval.bootstrap, "_draws", lambda num_images, seed: draws_RG)
    monkeypatch.setattr(eval.bootstrap, "DRAWS", len(draws_RG))
    found = gain([5.0, 2.0], [2.0, 3.0])
    assert found.gain == 1.0
    # The draws give 3, 1, 1, -1: a quarter below 0, and their deviation is sqrt(8 / 3).
    assert found.interval == pytest.approx([-1 + 0.075 * 2, 3 - 0.075 * 2])
    assert found.p == 2 * (1 + 1) / (4 + 1)
    assert found.detectable == pytest.approx((1.959964 + 0.841621) * math.sqrt(8 / 3), rel=1e-6)
    assert found.images == 2


def test_the_gain_is_that_of_scipy():
    # scipy 1.17.1, stats.bootstrap(paired=True, method="percentile", n_resamples=99999): interval
    # and standard error; stats.ttest_rel: the p value.
    low, high, error, p = -0.0275, 0.1525, 0.045807, 0.186729
    for seed in range(5):
        found = gain(SCORES, OTHERS, seed=seed)
        assert found.gain == pytest.approx(0.0625)
        assert found.interval == pytest.approx([low, high], abs=0.2 * error)
        assert found.p == pytest.approx(p, abs=0.05)
        assert found.detectable == pytest.approx(2.8016 * error, rel=0.08)


def test_what_is_hard_for_both_cancels_out():
    rng = np.random.default_rng(0)
    hardness, noise = rng.normal(0, 1, 200), rng.normal(0.05, 0.05, 200)
    score, other = (hardness + noise).tolist(), hardness.tolist()
    ends = [mean_of(values).interval(range(200), 0) for values in (score, other)]
    assert ends[0][0] < ends[1][1], "the intervals have many numbers in common"
    assert gain(score, other).is_shown


def test_about_95_of_100_intervals_hold_the_true_gain_and_p_is_rarely_small_without_any():
    held = shown = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shared = rng.exponential(1.0, 60)
        found = gain((shared + rng.normal(0, 1, 60)).tolist(), shared.tolist(), seed=seed)
        held += found.interval[0] <= 0 <= found.interval[1]
        shown += found.p < 0.05
    assert 0.9 <= held / 300 <= 0.98
    assert 0.02 <= shown / 300 <= 0.1


def test_the_smallest_gain_that_can_be_shown_is_shown_by_four_in_five_evaluations():
    rng = np.random.default_rng(5)
    truth = gain(rng.normal(0, 1, 100).tolist(), [0.0] * 100).detectable
    shown = [
        gain(np.random.default_rng(n).normal(truth, 1, 100).tolist(), [0.0] * 100, seed=n).is_shown
        for n in range(200)
    ]
    assert 0.7 <= np.mean(shown) <= 0.9


def test_images_are_drawn_with_all_their_texts():
    values = [0.3, 0.8] * 50
    apart = gain(values, [0.5] * 100)
    together = gain(sorted(values), [0.5] * 100, [n // 10 for n in range(100)])
    assert together.gain == pytest.approx(apart.gain)
    assert together.detectable > 2.5 * apart.detectable
    assert (apart.images, together.images) == (100, 10)
    twice = gain(values * 2, [0.5] * 200, [*range(100), *range(100)])
    assert (twice.interval, twice.p) == (pytest.approx(apart.interval), apart.p)


def test_the_same_texts_gain_nothing():
    assert gain(SCORES, SCORES) == Gain(0.0, [0.0, 0.0], 1.0, 0.0, 40)


def test_rounding_is_no_gain():
    # Three texts of an image, whose sums differ in the last digits.
    values = [0.1, 0.2, 0.3] * 20
    ids = [n // 3 for n in range(60)]
    assert sum(values[:3]) != sum(values[2::-1])
    assert gain(values, values[::-1], ids).interval == [0.0, 0.0]
    assert gain([value * (1 + 1e-8) for value in values], values).p == 1.0


def test_the_same_difference_everywhere_is_a_gain_without_doubt():
    found = gain([0.75] * 12, [0.5] * 12)
    assert (found.gain, found.interval, found.detectable) == (0.25, [0.25, 0.25], 0.0)
    assert found.p == 2 / (DRAWS + 1)
    assert found.is_shown


def test_a_loss_is_different_and_no_gain():
    found = gain([0.5] * 12, [0.75] * 12)
    assert (found.gain, found.p) == (-0.25, 2 / (DRAWS + 1))
    assert found.is_different
    assert not found.is_shown


@pytest.mark.parametrize(("images", "enough"), [(1, False), (5, False), (6, True)])
def test_a_few_images_show_nothing_as_a_few_coins_do(images, enough):
    found = gain([1.0] * images, [0.0] * images)
    assert found.p == 2.0 / 2**images
    assert found.is_shown == found.has_enough_images == enough


def test_only_images_that_count_are_counted():
    values, counts = [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]
    nothing = [0.0] * 4
    score, other = ratio_of(values, counts), ratio_of(nothing, counts)
    assert score.gain_over(other, [1, 2, 3, 3], 0).images == 2
    empty = ratio_of(nothing, nothing)
    assert empty.gain_over(empty, range(4), 0).images == 0


def test_both_scores_have_the_same_draws_and_no_order_of_images_matters():
    score, other = mean_of(SCORES), mean_of(OTHERS)
    order = np.random.default_rng(0).permutation(40)
    shuffled = [Measure(m.parts_NK[order], m.of_sums) for m in (score, other)]
    found = shuffled[0].gain_over(shuffled[1], order, 3)
    assert found.interval == pytest.approx(gain(SCORES, OTHERS, seed=3).interval)
    reverse = other.gain_over(score, range(40), 3)
    assert reverse.interval == pytest.approx([-end for end in found.interval[::-1]])
    assert reverse.p == found.p
