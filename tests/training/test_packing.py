"""Which texts share a row."""

import pytest

from lora_jax.training import packing


def test_assign_by_hand():
    # 6 and 5 get a row each; 3 and the first 2 share one; the other 2 opens one; 1 fills 3 + 2 up.
    assert packing.assign([2, 3, 6, 1, 5, 2], capacity=6, slots=4) == [[2], [4], [1, 0, 3], [5]]
    assert packing.assign([1, 1, 1], capacity=6, slots=2) == [[0, 1], [2]]


@pytest.mark.parametrize("lengths", [[3, 7], [0]])
def test_assign_refuses(lengths):
    with pytest.raises(ValueError, match="a row takes 1 to 6"):
        packing.assign(lengths, capacity=6, slots=2)
    with pytest.raises(ValueError, match="a row takes 1 to 6"):
        packing.assign_in_order(lengths, capacity=6, slots=2)
