"""A budget stops each task at a whole number of images."""

import pytest

from eval.scoring.budget import UNLIMITED, Budget, of_images

IMAGES = [5, 3, 3, 8, 1, 9, 2]
"""Images of seven questions, two of them about the same."""


class Clock:
    """A clock that a task moves."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


def reached(budget, clock, seconds, size=1):
    """The images of a task that takes some seconds for each part."""
    parts = []
    for part in budget.parts(IMAGES, size):
        clock.seconds += seconds
        parts.append(part)
    return parts


def test_without_a_limit_all_images_are_one_part():
    assert list(UNLIMITED.parts(IMAGES, 1)) == [{1, 2, 3, 5, 8, 9}]
    assert list(UNLIMITED.parts([], 1)) == [set()]
    assert UNLIMITED.reached([1], [1, 2]) == {}


def test_a_task_stops_at_the_end_of_its_share_and_leaves_the_rest():
    clock = Clock()
    budget = Budget(1, 3, now=clock)
    # A third of 60 s: four parts of 6 s; then half of 36 s, and all that is left.
    assert [len(reached(budget, clock, 6)) for _ in range(3)] == [4, 3, 3]
    assert clock.seconds == 160
    assert len(reached(budget, clock, 6)) == 1, "a task that nobody counted"


@pytest.mark.parametrize("size", [1, 2, 4, 99])
def test_the_first_part_is_reached_whatever_the_time(size):
    clock = Clock()
    (part,) = reached(Budget(1e-300, 1, now=clock), clock, 5, size)
    assert len(part) == min(size, 6)


def test_parts_are_disjoint_and_all_images_when_time_is_enough():
    clock = Clock()
    parts = reached(Budget(1e300, 1, now=clock), clock, 1, 4)
    assert [len(part) for part in parts] == [4, 2]
    assert set.union(*parts) == set(IMAGES)


def test_the_order_of_images_is_a_function_of_the_seed_and_no_order_of_ids():
    clock = Clock()
    orders = [
        [part.pop() for part in reached(Budget(9, 1, seed, clock), clock, 0)]
        for seed in (0, 0, 1, 2)
    ]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    assert sorted(orders[0]) != orders[0]


def test_the_number_of_images_stands_behind_a_title():
    section = Budget(1).reached([3, 3, 5], range(1234))
    assert section == {"budget": {"images": 2, "of": 1234}}
    assert of_images(section) == " (2 of 1,234 images)"
    assert of_images({"count": 4}) == ""
