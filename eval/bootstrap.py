"""Scores as functions of sums over texts, their 95 % intervals and gains by the bootstrap.

Images are resampled with all their texts, because texts about one image are not independent: the
percentile bootstrap of Efron and Tibshirani 1993, over clusters. The difference between two scores
of the same texts is taken draw by draw: what makes a text easy for both cancels out.

Letters: N texts, K sums per score, G images, R draws.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
"""Resamplings of the images."""

LEVEL = 0.95
"""Coverage of the intervals."""

POWER = 0.8
"""Probability that the smallest gain that can be shown is shown."""

ROUNDING = 1e-7
"""Largest difference between two equal scores, as a share of them: losses are sums of float32."""

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Gain:
    """How much better one score is than another one of the same texts; positive is better."""

    gain: float
    interval: list[float]
    """Both ends of the 95 % interval."""
    p: float
    """Two-sided p value of no difference."""
    detectable: float
    """The smallest gain that so many images can show: with 80 % probability, if it is true."""
    images: int
    """The number of images that count in the score."""

    @property
    def is_shown(self) -> bool:
        """Whether the images show a gain: the interval lies above 0, and p is below 0.05."""
        return self.is_different and self.interval[0] > 0

    @property
    def is_different(self) -> bool:
        """Whether the images show a gain or a loss."""
        low, high = self.interval
        return self.p < 1 - LEVEL and not low <= 0 <= high

    @property
    def p_text(self) -> str:
        """The p value in words; the draws show none below their number."""
        return f"p < {2 / DRAWS:g}" if self.p <= 2 / (1 + DRAWS) else f"p {self.p:.2g}"

    @property
    def has_enough_images(self) -> bool:
        """Whether so many images can show any gain."""
        return least_p(self.images) < 1 - LEVEL


def least_p(num_images: int) -> float:
    """Return the least p value of so many images: that of as many coins with the same side up."""
    return 2.0 ** (1 - num_images)


@dataclass(frozen=True, eq=False)
class Measure:
    """A score that is a function of sums over texts, like a mean, a ratio or BLEU."""

    parts_NK: Sums
    """Each text's part of the sums."""
    of_sums: Callable[[Sums], NDArray[np.float64]]
    """Maps sums [..., K] to scores [...]."""

    @property
    def value(self) -> float:
        """The score of all texts."""
        return float(self.of_sums(self.parts_NK.sum(0)))

    def interval(self, image_ids: Sequence[int], seed: int) -> list[float]:
        """Return the lower and the upper end of the 95 % interval.

        Args:
            image_ids: The image of each text: [N].
            seed: Seed of the draws.
        """
        return _interval(self._drawn(image_ids, seed))

    def gain_over(self, other: "Measure", image_ids: Sequence[int], seed: int) -> Gain:
        """Return how much higher this score is than another one of the same texts.

        The p value is twice the smaller share of draws on either side of 0, but at least that of
        `least_p`: the draws of a few images are too much alike.

        Args:
            other: The other score.
            image_ids: The image of each text: [N].
            seed: Seed of the draws.
        """
        gain = float(_difference(np.array(self.value), np.array(other.value)))
        gains_R = _difference(self._drawn(image_ids, seed), other._drawn(image_ids, seed))
        smaller_side = 1 + min((gains_R <= 0).sum(), (gains_R >= 0).sum())
        counts = np.any(self.parts_NK != 0, axis=1) | np.any(other.parts_NK != 0, axis=1)
        num_images = len(np.unique(np.asarray(image_ids)[counts]))
        normal = NormalDist()
        distance = normal.inv_cdf((1 + LEVEL) / 2) + normal.inv_cdf(POWER)
        return Gain(
            gain=gain,
            interval=_interval(gains_R),
            p=min(1.0, max(2 * float(smaller_side) / (1 + DRAWS), least_p(num_images))),
            detectable=distance * float(gains_R.std(ddof=1)),
            images=num_images,
        )

    def _drawn(self, image_ids: Sequence[int], seed: int) -> Sums:
        """Return the score of each draw of the images: [R]."""
        _, groups_N = np.unique(np.asarray(image_ids), return_inverse=True)
        sums_GK = np.zeros((groups_N.max() + 1, self.parts_NK.shape[1]))
        np.add.at(sums_GK, groups_N, self.parts_NK)
        return self.of_sums(_draws(len(sums_GK), seed) @ sums_GK)


def mean_of(values: Sequence[float]) -> Measure:
    """Return the mean of one value per text."""
    return ratio_of(values, [1.0] * len(values))


def ratio_of(numerators: Sequence[float], denominators: Sequence[float]) -> Measure:
    """Return the ratio of two sums; 0 if the denominator is 0."""
    parts_N2 = np.array([numerators, denominators], dtype=np.float64).T
    return Measure(parts_N2, lambda sums: divide(sums[..., 0], sums[..., 1]))


def divide(numerator: Sums, denominator: Sums) -> Sums:
    """Divide, with 0 where the denominator is 0."""
    is_defined = denominator != 0
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=is_defined)


def _interval(scores_R: Sums) -> list[float]:
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(scores_R, [tail, 100 - tail])
    return [float(low), float(high)]


def _difference(scores: Sums, others: Sums) -> Sums:
    """Subtract, with 0 where the difference is rounding."""
    difference = scores - others
    is_rounding = np.abs(difference) <= ROUNDING * np.maximum(np.abs(scores), np.abs(others))
    return np.where(is_rounding, 0.0, difference)


@functools.lru_cache(maxsize=2)
def _draws(num_images: int, seed: int) -> NDArray[np.float64]:
    """Return how often each image is drawn: [R, G], the same for all scores of some images."""
    shares = np.full(num_images, 1 / num_images)
    return np.random.default_rng(seed).multinomial(num_images, shares, DRAWS).astype(np.float64)
