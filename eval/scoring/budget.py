"""The time budget of an evaluation: each of its tasks stops at a whole number of images.

Images are taken in an order that depends on the seed alone, so those reached are a random sample.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np


class Budget:
    """Minutes that tasks share: each may take an equal part of what is left at its start."""

    def __init__(
        self,
        minutes: float | None = None,
        num_tasks: int = 1,
        seed: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            minutes: Time for all tasks; None for no limit.
            num_tasks: The number of tasks that will ask for their images.
            seed: Seed of the order of the images.
            now: Returns a time in seconds.
        """
        self.is_limited = minutes is not None
        self._end = now() + 60 * (minutes or 0.0)
        self._num_tasks = num_tasks
        self._seed = seed
        self._now = now

    def parts(self, image_ids: Iterable[int], size: int) -> Iterator[set[int]]:
        """Yield the images of a task part by part, until its share of the time is used up.

        Args:
            image_ids: The images; repeats count once.
            size: Number of images of a part. The first part is yielded whatever the time; without a
                limit it has all images.
        """
        distinct = sorted(set(image_ids))
        if not self.is_limited:
            yield set(distinct)
            return
        start = self._now()
        stop = start + (self._end - start) / max(self._num_tasks, 1)
        self._num_tasks -= 1
        order = np.random.default_rng(self._seed).permutation(len(distinct)).tolist()
        for first in range(0, len(order), size):
            if first and self._now() >= stop:
                return
            yield {distinct[number] for number in order[first : first + size]}

    def reached(self, images: Iterable[int], chosen: Iterable[int]) -> dict[str, Any]:
        """Return section `budget` of some scores, under its key; nothing without a limit.

        Args:
            images: The images that were reached.
            chosen: All images that were chosen.
        """
        if not self.is_limited:
            return {}
        return {"budget": {"images": len(set(images)), "of": len(set(chosen))}}


UNLIMITED = Budget()


def of_images(section: Mapping[str, Any]) -> str:
    """Return over how many of the chosen images a section is, in brackets; nothing without a limit.

    The text begins with a space, so that it can follow a title.
    """
    budget = section.get("budget")
    return f" ({budget['images']:,} of {budget['of']:,} images)" if budget else ""
