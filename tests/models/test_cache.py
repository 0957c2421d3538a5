"""The cache's update, mapped and differentiated, against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax.models.cache import write


@pytest.mark.parametrize("axes", [(0, 0, None), (0, None, None), (None, 0, 0)])
def test_mapped_and_differentiated_as_jaxs_own(axes):
    keys = jax.random.split(jax.random.key(0), 3)
    old = jax.random.normal(keys[0], (3, 2, 5, 4))
    new = jax.random.normal(keys[1], (3, 2, 2, 4))
    first = jnp.array([0, 3, 2])
    given = [x if axis == 0 else x[1] for x, axis in zip((old, new, first), axes, strict=True)]
    own = lambda old, new, first: lax.dynamic_update_slice_in_dim(old, new, first, 1)
    ours = lambda old, new, first: write(old, new, first, axis=1)
    weights = jax.random.normal(keys[2], (3, 2, 5, 4))

    def run(update):
        loss = lambda old, new: (weights * jax.vmap(update, axes)(old, new, given[2])).sum()
        return jax.vmap(update, axes)(*given), jax.grad(loss, (0, 1))(*given[:2])

    jax.tree.map(np.testing.assert_array_equal, run(ours), run(own))
    program = jax.jit(jax.vmap(ours, axes)).lower(*given).as_text()
    assert ("scatter" in program) == (axes[2] == 0)


def test_the_dtype_is_that_of_the_cache():
    old = jnp.zeros((2, 3), jnp.bfloat16)
    assert write(old, jnp.ones((2, 1)), jnp.int32(1), axis=1).dtype == jnp.bfloat16
