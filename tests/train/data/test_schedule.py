"""Laws of the plan: which texts make which step."""

import itertools
from collections import Counter

import numpy as np
import pytest

from train.data.order import global_order
from train.data.schedule import plan_steps

SIZES = np.array([5, 1, 5, 2, 7, 1, 1, 3, 5, 4, 6])
TOTAL = int(SIZES.sum())


def plan(*, sizes=SIZES, batch_size=4, texts_per_image=5, epochs=1.0, seed=3):
    return plan_steps(
        sizes,
        batch_size=batch_size,
        texts_per_image=texts_per_image,
        epochs=epochs,
        order=lambda number: global_order(len(sizes), seed, number),
    )


def texts_of(step, sizes=SIZES):
    """Image and text number of each text of a step."""
    return [
        (number, text)
        for number in step.image_numbers.tolist()
        for text in range(sizes[number])[step.texts]
    ]


def plain(steps):
    return [(step.image_numbers.tolist(), step.texts) for step in steps]


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("texts_per_image", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_every_epoch_holds_every_text_once(batch_size, texts_per_image, epochs):
    steps = plan(batch_size=batch_size, texts_per_image=texts_per_image, epochs=epochs)
    flat = list(itertools.chain(*map(texts_of, steps)))
    assert len(flat) == epochs * TOTAL
    for epoch in range(epochs):
        assert len(set(flat[epoch * TOTAL : (epoch + 1) * TOTAL])) == TOTAL


@pytest.mark.parametrize("texts_per_image", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_no_image_is_twice_in_a_step_nor_with_too_many_texts(batch_size, texts_per_image):
    steps = plan(batch_size=batch_size, texts_per_image=texts_per_image, epochs=2)
    assert steps
    for step in steps:
        counts = Counter(number for number, _ in texts_of(step))
        assert len(step.image_numbers) == len(counts), "each image has a text there"
        assert max(counts.values()) <= texts_per_image


@pytest.mark.parametrize("batch_size", [1, 4, 9, 20])
@pytest.mark.parametrize("texts_per_image", [2, 5, 100])
def test_a_step_just_reaches_the_batch_size_unless_it_ends_a_round(batch_size, texts_per_image):
    steps = plan(batch_size=batch_size, texts_per_image=texts_per_image, epochs=2)
    rounds = 2 * -(-int(SIZES.max()) // texts_per_image)
    in_rounds: list[list[list[int]]] = [[] for _ in range(rounds)]
    seen = number = 0
    for step in steps:
        first = step.texts.start
        sizes = np.minimum(SIZES[step.image_numbers] - first, texts_per_image).tolist()
        in_rounds[number].append(sizes)
        seen += len(sizes)
        if seen == np.count_nonzero(first < SIZES):
            seen, number = 0, number + 1
    assert number == rounds, "no step reaches over the end of a round"
    for steps_of_round in in_rounds:
        assert all(sum(sizes[:-1]) < batch_size for sizes in steps_of_round)
        assert all(sum(sizes) >= batch_size for sizes in steps_of_round[:-1])


@pytest.mark.parametrize("batch_size", range(1, 2 * TOTAL))
def test_no_step_is_empty(batch_size):
    for texts_per_image in (1, 3, 5, 7):
        for epochs in (0.1, 1):
            steps = plan(batch_size=batch_size, texts_per_image=texts_per_image, epochs=epochs)
            assert all(len(step.image_numbers) for step in steps)


def test_rounds_follow_each_other_and_each_has_an_order_of_its_own():
    steps = plan(texts_per_image=2, epochs=2)
    starts = [key for key, _ in itertools.groupby(step.texts.start for step in steps)]
    assert starts == [0, 2, 4, 6] * 2
    orders = [
        list(itertools.chain(*(step.image_numbers.tolist() for step in group)))
        for _, group in itertools.groupby(steps, key=lambda step: step.texts)
    ]
    for number, found in enumerate(orders):
        whole = global_order(len(SIZES), 3, number).tolist()
        assert found == [image for image in whole if SIZES[image] > number % 4 * 2]


@pytest.mark.parametrize("texts_per_image", [7, 8, 1000])
def test_with_room_for_all_texts_an_epoch_is_the_plain_order(texts_per_image):
    steps = plan(texts_per_image=texts_per_image, epochs=3)
    flat = np.concatenate([step.image_numbers for step in steps])
    for epoch in range(3):
        part = flat[epoch * len(SIZES) : (epoch + 1) * len(SIZES)]
        assert np.array_equal(part, global_order(len(SIZES), 3, epoch))


@pytest.mark.parametrize("texts_per_image", [2, 5, 100])
def test_the_plan_is_a_pure_function(texts_per_image):
    np.random.seed(1)
    first = plain(plan(texts_per_image=texts_per_image, epochs=3))
    np.random.seed(2)
    assert plain(plan(texts_per_image=texts_per_image, epochs=3)) == first
    one = plain(plan(texts_per_image=texts_per_image, epochs=1))
    assert first[: len(one)] == one, "later epochs do not change earlier ones"
    assert first[len(one) : 2 * len(one)] != one, "epochs differ"
    assert plain(plan(texts_per_image=texts_per_image, epochs=3, seed=4)) != first


@pytest.mark.parametrize("texts_per_image", [2, 5, 100])
@pytest.mark.parametrize("epochs", [0.25, 0.5, 1.25, 1.5])
def test_a_fraction_of_an_epoch_is_the_beginning_of_the_whole(epochs, texts_per_image):
    def images(epochs):
        steps = plan(texts_per_image=texts_per_image, epochs=epochs)
        return [(n, step.texts) for step in steps for n in step.image_numbers.tolist()]

    part, whole = images(epochs), images(2)
    assert part == whole[: len(part)]
    assert len(part) == round(epochs * len(whole) / 2)


def test_even_the_smallest_share_of_an_epoch_is_a_step():
    (step,) = plan(sizes=np.array([5, 5]), epochs=0.01)
    assert len(step.image_numbers) == 1


def test_texts_beyond_those_of_one_step_come_later_in_the_epoch():
    """COCO: five captions of each image first, then the sixth and seventh of the few that have
    them.
    """
    sizes = np.array([5] * 40 + [6, 7] * 2)
    steps = plan(sizes=sizes, batch_size=20, texts_per_image=5)
    later = [step for step in steps if step.texts.start == 5]
    assert steps[-len(later) :] == later
    assert sum(len(texts_of(step, sizes)) for step in later) == 6
    assert sum(len(texts_of(step, sizes)) for step in steps) == sizes.sum()
