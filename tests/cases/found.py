"""Programs that the fuzzer found wrong once (`python -m tests.fuzz`)."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.cases.table import case, normal


@case(layouts={"w": "io"}, reverse=False)
def while_loop_that_ends_for_each_example(dtype):
    """vmap gives each example a condition of its own, which `lax.while_loop` does not take."""

    def fn(params, x, steps):
        def one(row, n):
            step = lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ params["w"]))
            return lax.while_loop(lambda carry: carry[0] < n, step, (0, row))[1]

        return jax.vmap(one)(x, steps)

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (3, 7), dtype), jnp.array([2, 0, 3]))
