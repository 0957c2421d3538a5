"""`combine` on fully trained leaves and trained rows: base + Σ w (value - base), by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, StructureError, TrainedLeaf, TrainedRows

ONE = jnp.float32(1)
BASE = {"bias": jnp.array([1.0, 2.0, 3.0]), "embed": jnp.arange(8.0).reshape(4, 2)}


def whole(*values, scale=ONE):
    return {"bias": TrainedLeaf(None, jnp.array(values), scale), "embed": None}


def rows(rows, *values, axis=0):
    layout = Layout("io")
    node = TrainedRows(None, jnp.array(values), ONE, rows=rows, axis=axis, layout=layout)
    return {"bias": None, "embed": node}


def test_changes_of_the_base_are_added():
    got = lora_jax.combine([whole(2.0, 2, 2), whole(1.0, 4, 3)], [0.5, -1], base=BASE)
    np.testing.assert_allclose(got["bias"].value, [1.5, 0, 2.5])
    assert got["bias"].scale == 1 and got["embed"] is None
    merged = lora_jax.merge(lora_jax.join(BASE, got))
    np.testing.assert_allclose(merged["bias"], [1.5, 0, 2.5])


def test_an_average_needs_no_base():
    some = [whole(2.0, 2, 2), whole(1.0, 4, 3)]
    for weights in ([0.5, 0.5], [3.0, -2.0]):
        got = lora_jax.combine(some, weights)["bias"].value
        want = lora_jax.combine(some, weights, base=BASE)["bias"].value
        np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(StructureError, match=r"bias: a fully trained leaf, .* weights that add up"):
        lora_jax.combine(some)
    with pytest.raises(StructureError, match=r"bias: a fully trained leaf, .* the parameters$"):
        lora_jax.combine(some, method="ties", density=0.5)


def test_a_leaf_that_is_off_changes_nothing():
    off = whole(9.0, 9, 9, scale=jnp.float32(0))
    got = lora_jax.combine([whole(2.0, 2, 2), off], base=BASE)["bias"]
    np.testing.assert_allclose(got.value, [2, 2, 2])
    assert lora_jax.combine([off, off], base=BASE)["bias"].scale == 0
    stacked = {"bias": jnp.zeros((2, 3)), "embed": BASE["embed"]}
    some = [TrainedLeaf(None, jnp.ones((2, 3)), jnp.array(x)) for x in ([[1.0], [0.0]], 1.0)]
    nodes = [{"bias": node, "embed": None} for node in some]
    got = lora_jax.combine(nodes, [2.0, 3.0], base=stacked)["bias"]
    np.testing.assert_allclose(got.value, [[5, 5, 5], [3, 3, 3]])
    np.testing.assert_array_equal(got.scale, [[1], [1]])


def test_ties_of_changes():
    """Of 3 changes the largest 2 stay; the signs of the sums are +, -, +."""
    some = [whole(4.0, -1, 3.5), whole(0.0, 4, 13)]  # changes 3, -3, 0.5 and -1, 2, 10
    got = lora_jax.combine(some, [2, 1], method="ties", density=0.67, base=BASE)["bias"]
    np.testing.assert_allclose(got.value, [1 + 6, 2 - 6, 3 + 10])


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_of_several_adapters(axis):
    base = {"bias": BASE["bias"], "embed": BASE["embed"] if axis == 0 else BASE["embed"].T}
    some = rows((2, 0), [5.0, 5], [1.0, 1], axis=axis), rows((3, 2), [7.0, 7], [4.0, 6], axis=axis)
    got = lora_jax.combine(some, [2, -1], base=base)["embed"]
    assert got.rows == (2, 0, 3)
    want = np.array(BASE["embed"])
    want[2] += 2 * np.array([1, 0]) - [0, 1]  # base row 2 is [4, 5]
    want[0] += 2 * np.array([1, 0])
    want[3] -= [1, 0]
    merged = lora_jax.merge(lora_jax.join(base, {"bias": None, "embed": got}))["embed"]
    np.testing.assert_allclose(merged if axis == 0 else merged.T, want)
    with pytest.raises(StructureError, match="embed: trained rows, whose change is value - base"):
        lora_jax.combine(some, [0.5, 0.5])


def test_kinds_must_agree():
    a, b, layout = jnp.ones((4, 1)), jnp.ones((1, 2)), Layout("io")
    factors = {"bias": None, "embed": lora_jax.LoraWeight(None, a, b, ONE, layout=layout)}
    with pytest.raises(StructureError, match=r"embed: factors of .* in adapters\[0\], trained"):
        lora_jax.combine([factors, rows((1,), [5.0, 5])], base=BASE)
