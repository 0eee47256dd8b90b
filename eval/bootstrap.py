"""Scores as functions of sums over texts, and their 95 % intervals by the bootstrap.

Images are resampled with all their texts, because texts about one image are not independent: the
percentile bootstrap of Efron and Tibshirani 1993, over clusters.

Letters: N texts, K sums per score, G images, R draws.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
"""Resamplings of the images."""

LEVEL = 0.95
"""Coverage of the intervals."""

Sums = NDArray[np.float64]


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
        _, groups_N = np.unique(np.asarray(image_ids), return_inverse=True)
        sums_GK = np.zeros((groups_N.max() + 1, self.parts_NK.shape[1]))
        np.add.at(sums_GK, groups_N, self.parts_NK)
        times_RG = _draws(len(sums_GK), seed)
        tail = 100 * (1 - LEVEL) / 2
        low, high = np.percentile(self.of_sums(times_RG @ sums_GK), [tail, 100 - tail])
        return [float(low), float(high)]


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


@functools.lru_cache(maxsize=2)
def _draws(num_images: int, seed: int) -> NDArray[np.float64]:
    """Return how often each image is drawn: [R, G], the same for all scores of some images."""
    shares = np.full(num_images, 1 / num_images)
    return np.random.default_rng(seed).multinomial(num_images, shares, DRAWS).astype(np.float64)
