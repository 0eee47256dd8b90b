import itertools

import pytest

from pipeline.indexing.collect import split_by_hash

IDS = [*range(-500, 4_500), 2**63 - 1, -(2**63)]


def val_of(image_ids, share):
    return [i for i in image_ids if split_by_hash(i, share) == "val"]


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_a_hash_puts_about_the_share_into_val(share):
    # Four standard deviations of independent choices.
    most = 4 * (share * (1 - share) * len(IDS)) ** 0.5
    assert abs(len(val_of(IDS, share)) - share * len(IDS)) < most


def test_a_larger_share_moves_no_image_out_of_val():
    sets = [set(val_of(IDS, share)) for share in (0, 0.1, 0.2, 0.20001, 0.7, 1)]
    assert all(small <= large for small, large in itertools.pairwise(sets))
    assert (sets[0], sets[-1]) == (set(), set(IDS))


def test_the_split_of_an_image_is_the_same_in_all_versions():
    # A model of an earlier version must not have learned from what is evaluated now.
    assert val_of(range(60), 0.2) == [1, 2, 9, 11, 14, 16, 18, 19, 27, 31, 39, 45, 54, 58]
