"""Weights as matrices: against loops over their elements."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.core.layout import Layout
from lora_jax.core.matrices import as_factors, from_matrices, map_matrices, to_matrices

SIZES = (2, 3, 4, 5)


@pytest.mark.parametrize("axes", ["io", "oi", "ooi", "oib", "boi", "obio", "iobo"])
def test_there_and_back(axes):
    layout, shape = Layout(axes), SIZES[: len(axes)]
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    got = to_matrices(jnp.asarray(w), layout)
    batch, ins, outs = (layout.select(kind, shape) for kind in "bio")
    assert got.shape == (*batch, np.prod(ins), np.prod(outs))
    for index in itertools.product(*map(range, shape)):
        at = {kind: [i for i, k in zip(index, axes, strict=True) if k == kind] for kind in "bio"}
        row, column = np.ravel_multi_index(at["i"], ins), np.ravel_multi_index(at["o"], outs)
        assert got[(*at["b"], row, column)] == w[index]
    np.testing.assert_array_equal(from_matrices(got, layout, shape), w)


def test_each_matrix_on_its_own():
    """Each with a key of its own; the results in the order of the batch axes."""
    w = jnp.arange(48.0).reshape(2, 4, 3, 2)  # two batch axes, at both ends
    layout = Layout("biob")
    one = lambda key, m, n: (jax.random.uniform(key), m.sum() - n.mean(), m @ n.T)
    draws, sums, products = map_matrices(one, jax.random.key(0), layout, w, w + 1)
    assert draws.shape == sums.shape == (2, 2) and len(np.unique(draws)) == 4
    m = np.transpose(w, (0, 3, 1, 2))
    np.testing.assert_allclose(sums, m.sum((2, 3)) - (m + 1).mean((2, 3)))
    np.testing.assert_allclose(products, m @ np.swapaxes(m + 1, 2, 3))


def test_factors_have_the_axes_of_the_weight():
    a, b = as_factors(jnp.ones((5, 6, 2)), jnp.ones((5, 2, 7)), Layout("iobi"), (2, 7, 5, 3))
    assert a.shape == (5, 2, 3, 2) and b.shape == (5, 2, 7)
