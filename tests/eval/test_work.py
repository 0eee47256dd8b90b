import pytest

from eval.work import choose


@pytest.mark.parametrize("most", [1, 2, 19, 20, 21, 10**9])
def test_choosing_keeps_the_order_takes_none_twice_and_follows_the_seed(most):
    items = list("abcdefghijklmnopqrst")
    found = choose(items, most, 3)
    assert len(found) == len(set(found)) == min(most, 20)
    assert found == sorted(found) == choose(items, most, 3)
    if most < 20:
        assert any(choose(items, most, seed) != found for seed in range(9))
    assert choose([], most, 3) == []
