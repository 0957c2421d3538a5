"""The algebra of one weight, on hand-computed numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import Layout, LayoutError, LoraWeight, TrainedLeaf
from lora_jax.core.algebra import delta, dense
from lora_jax.core.weights import check_fits, is_adapted


def weight(layout, w, a, b, scale=1.0):
    batch = [n for n, axis in zip(np.shape(w), layout, strict=True) if axis == "b"]
    arrays = (jnp.asarray(x, jnp.float32) for x in (w, a, b, jnp.full(batch, scale)))
    return LoraWeight(*arrays, layout=Layout(layout))


def test_dense_by_hand():
    node = weight("io", [[1, 0], [0, 1]], [[1], [2]], [[3, 4]], scale=0.5)
    np.testing.assert_array_equal(dense(node), [[2.5, 2.0], [3.0, 5.0]])


def test_out_before_in():
    node = weight("oi", [[1, 0, 0], [0, 1, 0]], [[1], [2], [3]], [[10, 20]])
    np.testing.assert_array_equal(delta(node), [[10, 20, 30], [20, 40, 60]])


def test_batch_axes_have_factors_and_scales_of_their_own():
    node = weight("bio", jnp.zeros((2, 1, 1)), [[[1]], [[2]]], [[[3]], [[4]]])
    scaled = LoraWeight(node.w, node.a, node.b, jnp.array([1.0, 10.0]), layout=node.layout)
    np.testing.assert_array_equal(delta(scaled), [[[3]], [[80]]])


def test_layout_with_several_in_and_out_axes():
    layout = Layout("ioibo")
    shape = (2, 3, 4, 5, 6)
    assert layout.a_shape(shape, 7) == (5, 2, 4, 7)
    assert layout.b_shape(shape, 7) == (5, 7, 3, 6)
    assert (layout.fan_in(shape), layout.fan_out(shape)) == (8, 18)
    node = LoraWeight(
        None, jnp.ones((5, 2, 4, 7)), jnp.ones((5, 7, 3, 6)), jnp.ones(5), layout=layout
    )
    assert node.shape == shape and node.rank == 7 and delta(node).shape == shape


@pytest.mark.parametrize("axes", ["", "ii", "oo", "bo", "ix", "b"])
def test_layouts_that_mean_nothing(axes):
    with pytest.raises(LayoutError):
        Layout(axes)


def test_what_tells_layouts_apart():
    """The uses are for display alone; `lookup_only` decides an initialization."""
    assert Layout("io", ("dot_general",)) == Layout("io")
    assert hash(Layout("io", ("dot_general",))) == hash(Layout("io"))
    assert Layout("io", lookup_only=True) != Layout("io")
    assert hash(Layout("io", lookup_only=True)) != hash(Layout("io"))


def test_one_rounding_to_the_base_dtype():
    """1 + 2⁻⁹ + 2⁻⁹ rounds to 1 + 2⁻⁷·½ up or down once; two roundings would lose both."""
    w = jnp.ones((1, 1), jnp.bfloat16)
    a, b = jnp.ones((1, 2)), jnp.full((2, 1), 2.0**-8)
    node = LoraWeight(w, a, b, jnp.float32(1), layout=Layout("io"))
    assert dense(node).dtype == jnp.bfloat16
    assert float(dense(node)[0, 0]) == 1 + 2.0**-7  # each half alone would round away


def test_a_trained_leaf_is_its_value_until_it_is_switched_off():
    node = TrainedLeaf(jnp.zeros(2), jnp.ones(2), jnp.float32(1))
    np.testing.assert_array_equal(dense(node), [1, 1])
    off = TrainedLeaf(node.w, node.value, jnp.float32(0))
    np.testing.assert_array_equal(dense(off), [0, 0])


def test_nodes_are_pytrees_with_named_fields():
    node = weight("io", [[1.0]], [[1.0]], [[1.0]])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(node)]
    assert paths == [".w", ".a", ".b", ".scale"]
    assert is_adapted(jax.tree.map(lambda x: x + 1, node))


def test_check_fits_lists_every_difference():
    node = weight("io", jnp.zeros((2, 3)), jnp.zeros((2, 1)), jnp.zeros((1, 3)))
    assert check_fits("p", node, jnp.zeros((2, 3))) == []
    assert len(check_fits("p", node, jnp.zeros((4, 5)))) == 2
    assert "layout" in check_fits("p", node, jnp.zeros((2, 3, 1)))[0]
    assert "str" in check_fits("p", node, "text")[0]
