"""Bare arrays: orientations, views and stacks."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.programs.table import case, normal


@case(layouts={"w": "oi"})
def matmul_transposed(dtype):
    return (
        lambda params, x: x @ params["w"].T,
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 5), dtype),),
    )


@case(layouts={"w": "oio"})
def einsum(dtype):
    return (
        lambda params, x: jnp.einsum("hdk,btd->bthk", params["w"], x),
        {"w": normal(1, (3, 7, 5), dtype)},
        (normal(0, (2, 4, 7), dtype),),
    )


@case(layouts={"up": "oio", "down": "iio"})
def experts(dtype):
    """Every token meets every expert: to the program, experts are one more out or in axis."""

    def fn(params, x, gates):
        h = jnp.tanh(jnp.einsum("td,edf->tef", x, params["up"]))
        return jnp.einsum("etf,efd,te->td", jnp.swapaxes(h, 0, 1), params["down"], gates)

    params = {"up": normal(1, (3, 7, 11), dtype), "down": normal(2, (3, 11, 7), dtype)}
    return fn, params, (normal(0, (4, 7), dtype), jax.nn.softmax(normal(5, (4, 3), dtype)))


@case(layouts={"w": "bio"})
def experts_batched(dtype):
    return (
        lambda params, x: jnp.einsum("etd,edf->etf", x, params["w"]),
        {"w": normal(1, (3, 7, 5), dtype)},
        (normal(0, (3, 4, 7), dtype),),
    )


@case(layouts={"w": "io"})
def reshaped_and_scaled(dtype):
    def fn(params, x):
        w = (params["w"] / 3).reshape(7, 3, 5)[:, ::-1].transpose(1, 2, 0)
        return jnp.einsum("td,hkd->thk", x, -w * 2)

    return fn, {"w": normal(1, (7, 15), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "oio"})
def summed_axis(dtype):
    """einsum sums an axis that the other operand lacks before it contracts the rest."""
    return (
        lambda params, x: jnp.einsum("bi,aio->bo", x, params["w"]),
        {"w": normal(1, (3, 7, 5), dtype)},
        (normal(0, (4, 7), dtype),),
    )


@case(layouts={"qkv": "io"})
def fused_qkv_slices(dtype):
    def fn(params, x):
        q, k, v = jnp.split(params["qkv"], 3, axis=1)
        return (x @ q) * (x @ k) + x @ v

    return fn, {"qkv": normal(1, (7, 15), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "io"})
def embedding_row_then_matrix(dtype):
    """Rows looked up and contracted over their whole length, also by an index from the end."""

    def fn(params, ids, matrix):
        last = lax.dynamic_slice(params["w"], (ids[0] - 2, 0), (1, 5))[0]
        return params["w"][ids] @ matrix, matrix.T @ last

    return fn, {"w": normal(1, (7, 5), dtype)}, (jnp.array([1, 6, 1]), normal(0, (5, 4), dtype))


@case(layouts={"w": "bio"})
def stacked_weights_picked_per_example(dtype):
    """vmap turns the dynamic slice of an index into a stack into a gather."""

    def fn(params, x, which):
        return jax.vmap(lambda row, i: jnp.tanh(row @ params["w"][i]))(x, which)

    w = {"w": normal(1, (3, 7, 5), dtype)}
    return fn, w, (normal(0, (4, 7), dtype), jnp.array([2, 0, 1, -1]))


@case(layouts={"w": "bio"})
def stacked_weights_unpacked(dtype):
    def fn(params, x):
        first, second = params["w"]
        return jnp.tanh(x @ first) @ second + x @ params["w"][1]

    return fn, {"w": normal(1, (2, 7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"kernel": "io"})
def learned_queries(dtype):
    """Two parameters meet; the right one is the layer, whichever is larger."""

    def fn(params, x):
        return jnp.tanh(params["queries"] @ params["kernel"]) @ x

    params = {"queries": normal(1, (11, 5), dtype), "kernel": normal(2, (5, 3), dtype)}
    return fn, params, (normal(0, (3, 4), dtype),)


@case(layouts={"w": "io"}, shapes_collide=True)
def activation_of_the_same_shape(dtype):
    """x has the weight's shape and value: matched by shape, it would be adapted too."""
    w = normal(1, (6, 6), dtype)
    return (lambda params, x: (x @ params["w"]) @ x, {"w": w}, (w,))


@case(layouts={"w": "io", "v": "ioo"})
def scaled_along_axes(dtype):
    """Weight normalization and quantization: one scale per output, or per input."""

    def fn(params, x):
        w = x.mean() * params["g"] * params["w"] / (2 + jnp.cos(x.mean(0)))[:, None]
        v = jnp.cos(x.T[None, :5, :3]) * params["v"].swapaxes(1, 2)
        return x @ w, jnp.einsum("ti,ikh->thk", x, v)

    params = {"w": normal(1, (7, 5), dtype), "g": normal(2, (1, 5), dtype)}
    return fn, params | {"v": normal(3, (7, 3, 5), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"kv": "ioo"})
def repeated_heads(dtype):
    """Grouped-query attention: each of two key heads serves three query heads."""

    def fn(params, x):
        repeated = jnp.repeat(params["kv"], 3, axis=1)
        return jnp.einsum("td,dhk->thk", x, repeated), x @ jnp.tile(params["kv"][:, 0], (1, 2))

    return fn, {"kv": normal(1, (7, 2, 5), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "io"})
def padded_weight(dtype):
    """Padded to a width that suits the hardware; the padding need not be zero."""

    def fn(params, x):
        zeros = jnp.pad(params["w"], ((0, 1), (2, 0)))
        ones = jnp.pad(params["w"][::-1], ((0, 1), (0, 0)), constant_values=1.5)
        return (x @ zeros) @ zeros[:7].T, x @ ones

    return fn, {"w": normal(1, (7, 5), dtype) / 4}, (normal(0, (4, 8), dtype) / 4,)


@case(layouts={"w": "io", "v": "io"})
def moved_to_the_device(dtype):
    """As a program does whose weights are kept in host memory: all at once, or layer by layer."""

    def fn(params, x):
        moved = jax.device_put(params, jax.memory.Space.Device)
        return jnp.tanh(x @ moved["w"]) @ jax.device_put(moved["v"], jax.devices()[0])

    params = {"w": normal(1, (7, 5), dtype), "v": normal(2, (5, 4), dtype)}
    return fn, params, (normal(0, (3, 7), dtype),)
