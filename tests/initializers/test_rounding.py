"""The round trips through int8 and NF4, against numpy loops and the papers' own formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lora_jax.initializers.rounding import NF4, int8, nf4

W = jax.random.normal(jax.random.key(0), (100, 6)) * jnp.array([[1.0, 0.1, 5.0, 1.0, 1.0, 0.0]])


def test_the_values_of_nf4_are_quantiles_of_a_normal_distribution():
    """QLoRA, appendix E: of probabilities in [1 − offset, offset], normalised to [-1, 1]."""
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    positive = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative]))
    np.testing.assert_allclose(NF4, values / values.max(), atol=2e-6)


def test_int8_is_the_nearest_of_255_steps_of_each_output():
    want = np.zeros(W.shape)
    for j, column in enumerate(np.asarray(W).T):
        step = max(abs(column)) / 127
        for i, x in enumerate(column):
            want[i, j] = round(x / step) * step if step else 0
    np.testing.assert_allclose(int8(W), want, atol=1e-6)


@pytest.mark.parametrize("block", [64, 7, 200])
def test_nf4_is_the_nearest_of_16_values_of_each_block(block):
    want = np.zeros(W.shape)
    for j, column in enumerate(np.asarray(W).T):
        for start in range(0, len(column), block):
            part = column[start : start + block]
            values = np.array(NF4) * max(abs(part))
            want[start : start + block, j] = [min(values, key=lambda v: abs(v - x)) for x in part]
    got = jax.jit(nf4, static_argnums=1)(W, block)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("rounded", [int8, nf4])
def test_rounding_twice_is_rounding_once(rounded):
    once = rounded(W)
    assert once.dtype == W.dtype and not np.array_equal(once, W)
    np.testing.assert_allclose(rounded(once), once, atol=1e-6)
