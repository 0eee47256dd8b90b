"""Which texts make which optimizer step: a pure function of sizes, order and settings.

An epoch sees every text once. An image with more texts than a step may hold of one image returns in
a later round of the epoch with the next texts: a step never holds an image twice.

Letters: N images, K images of a step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PlannedStep:
    """The texts of one optimizer step: the same slice of the texts of some images."""

    image_numbers: NDArray[np.int64]
    """int64 [K], in order."""
    texts: slice
    """Which texts of each image."""


def plan_steps(
    num_texts: NDArray[np.int64],
    *,
    batch_size: int,
    texts_per_image: int,
    epochs: float,
    order: Callable[[int], NDArray[np.int64]],
) -> list[PlannedStep]:
    """Decide which texts make which step.

    Args:
        num_texts: Texts of each image [N], at least one.
        batch_size: Texts of a step: images are added until it has at least so many. The last step
            of a round may be smaller.
        texts_per_image: Most texts of an image in a step.
        epochs: Passes over the texts; 0.5 is the first half of an epoch's order.
        order: Returns the order of all images [N] for the number of a round, counted over all
            epochs.

    Returns:
        The steps in order; at least one.
    """
    rounds = num_rounds(num_texts, texts_per_image)
    remaining = max(1, round(epochs * int((-(-num_texts // texts_per_image)).sum())))
    steps: list[PlannedStep] = []
    number = 0
    while remaining > 0:
        first = number % rounds * texts_per_image
        shuffled = order(number)
        images = shuffled[num_texts[shuffled] > first][:remaining]
        sizes = np.minimum(num_texts[images] - first, texts_per_image)
        texts = slice(first, first + texts_per_image)
        steps += [PlannedStep(part, texts) for part in _cut(images, sizes, batch_size)]
        remaining -= len(images)
        number += 1
    return steps


def num_rounds(num_texts: NDArray[np.int64], texts_per_image: int) -> int:
    """Return the rounds of an epoch over the images."""
    return -(-int(num_texts.max()) // texts_per_image)


def _cut(
    images: NDArray[np.int64], sizes: NDArray[np.int64], batch_size: int
) -> list[NDArray[np.int64]]:
    """Cut after every image that completes a batch of texts."""
    ends = sizes.cumsum()
    cuts: list[int] = []
    cut = int(np.searchsorted(ends, batch_size)) + 1
    while cut < len(images):
        cuts.append(cut)
        cut = int(np.searchsorted(ends, ends[cut - 1] + batch_size)) + 1
    return np.split(images, cuts)
