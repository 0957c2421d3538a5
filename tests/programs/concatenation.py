"""Several kernels made into one: concatenated along any kind of axis, or stacked."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from tests.programs.table import case, linen, normal


@case(layouts={f"cell/{side}{gate}/kernel": "io" for side in "hi" for gate in "figo"})
def optimized_lstm(dtype):
    """Eight kernels, concatenated into two inside a scan."""
    module = nn.RNN(nn.OptimizedLSTMCell(16, param_dtype=dtype, name="cell"))
    return linen(module, normal(0, (2, 3, 15), dtype))


@case(layouts={"q": "ioo", "k": "ioo", "v": "ioo"})
def concatenated_qkv(dtype):
    """Along an out axis, where v shares nothing with the others and q is longer."""

    def fn(params, x):
        qkv = jnp.concatenate([params["q"], params["k"], params["v"]], axis=1)
        return jnp.einsum("td,dhk->thk", x, qkv)

    heads = {"q": 6, "k": 2, "v": 2}
    params = {n: normal(i, (23, h, 5), dtype) for i, (n, h) in enumerate(heads.items())}
    return fn, params, (normal(5, (4, 23), dtype),)


@case(layouts={"left": "io", "right": "io"})
def concatenated_inputs(dtype):
    """Along the in axis, one of the kernels transposed: what A is of one, B is of the other."""

    def fn(params, x, y):
        y = y + jnp.tanh(x @ params["left"] / 9) @ params["right"] / 9
        w = jnp.concatenate([params["left"], params["right"].T])
        return jnp.concatenate([x, y], 1) @ w / 9

    params = {"left": normal(1, (11, 13), dtype), "right": normal(2, (13, 17), dtype)}
    return fn, params, (normal(0, (3, 11), dtype), normal(3, (3, 17), dtype))


@case(layouts={"w": "io"})
def rolled_and_rotated(dtype):
    """Slices of one weight, put together again: both halves share A, and the rank stays."""

    def fn(params, x):
        w = jnp.roll(params["w"], 2, axis=1)
        return x @ jnp.concatenate([-w[:, 3:], w[:, :3]], axis=1)

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "io"})
def concatenated_with_an_array(dtype):
    def fn(params, x, fixed):
        return x @ jnp.concatenate([fixed, params["w"], jnp.ones((7, 2), dtype)], axis=1)

    w = {"w": normal(1, (7, 5), dtype)}
    return fn, w, (normal(0, (4, 7), dtype), normal(2, (7, 3), dtype))


@case(layouts={"one": "io", "two": "oi"})
def selected_by_a_flag(dtype):
    """One weight or the other or none, and one weight at two scales."""

    def fn(params, x, flag):
        one, two = params["one"], params["two"]
        chosen, doubled = jnp.where(flag, one, two.T), jnp.where(flag, one, 2 * one)
        return x @ chosen, x @ doubled, x @ jnp.where(flag, 0, two.T)

    params = {"one": normal(1, (7, 5), dtype), "two": normal(2, (5, 7), dtype)}
    return fn, params, (normal(0, (4, 7), dtype), jnp.array(False))


@case(layouts={"layers/0": "io", "layers/1": "io", "more": "bio"})
def stacked_for_a_scan(dtype):
    """Two kernels stacked, two more appended, then scanned over."""

    def fn(params, x):
        stack = jnp.concatenate([jnp.stack(params["layers"]), params["more"]])
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]

    layers = [normal(i, (7, 7), dtype) for i in range(2)]
    params = {"layers": layers, "more": normal(2, (2, 7, 7), dtype)}
    return fn, params, (normal(5, (3, 7), dtype),)
