"""Programs in which the weight must be materialized."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.programs.table import case, normal


@case(layouts={"w": "io"}, dense="pure_callback", differentiable=False)
def opaque_kernel(dtype):
    import numpy as np

    def fn(params, x):
        out = jax.ShapeDtypeStruct((3, 5), dtype)
        return jax.pure_callback(lambda w, x: np.asarray(x) @ np.asarray(w), out, params["w"], x)

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, dense="mul")
def masked_weight(dtype):
    """A masked weight is contracted: that shows the layout, and runs dense."""

    def fn(params, x):
        return x @ (params["w"] * jnp.tri(7, 5, dtype=dtype))

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, dense="custom_vmap_call", reverse=False)
def custom_vmap(dtype):
    @jax.custom_batching.custom_vmap
    def f(w, x):
        return jnp.tanh(x @ w)

    f.def_vmap(lambda size, batched, w, x: (jax.vmap(lambda x: jnp.tanh(x @ w))(x), True))
    return (
        lambda params, x: f(params["w"], x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"w": "io"}, dense="integer_pow")
def weight_decay_term(dtype):
    def fn(params, x):
        return (x @ params["w"]).sum() + (params["w"] ** 2).sum()

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, dense="scan")
def loop_that_changes_the_weight(dtype):
    def fn(params, x):
        def step(w, _):
            return w * 0.5 + 0.1, (x @ w).mean()

        return lax.scan(step, params["w"], None, length=3)[1] + (x @ params["w"]).mean()

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, dense="cond")
def cond_chooses_what_is_no_weight(dtype):
    def fn(params, x, flag):
        w = lax.cond(flag, lambda w: w * 2, lambda w: jnp.ones_like(w), params["w"])
        return x @ w + x @ params["w"]

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype), jnp.array(True))
