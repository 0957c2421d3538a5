"""Programs of every kind, each with the inputs that its weights meet kept beside it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

N, D = 40, 6  # inputs a batch, and of what size


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs_of_size(seed, *shape):
    """Inputs whose variance falls from entry to entry, about a mean that is not zero."""
    entry = np.arange(shape[-1], dtype=np.float32)
    return normal(seed, *shape) * np.float32(0.7) ** entry + np.sin(entry)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of (params, *args), and by path all that each weight meets, layer by layer."""

    fn: Callable
    params: Any
    args: tuple
    inputs: dict[str, list]


PROGRAMS: dict[str, Callable[[], Program]] = {}


def program(build):
    PROGRAMS[build.__name__] = build
    return build


def layer(w, x):
    return jnp.tanh(x @ w)


def by_scan(body, stack, x):
    return jax.lax.scan(lambda x, w: (body(w, x), None), x, stack)[0]


@jax.custom_vjp
def with_author_derivative(w, x):
    return layer(w, x)


with_author_derivative.defvjp(
    lambda w, x: (layer(w, x), (w, x)), lambda saved, g: jax.vjp(layer, *saved)[1](g)
)


@jax.custom_jvp
def with_author_tangent(w, x):
    return layer(w, x)


with_author_tangent.defjvp(lambda primals, tangents: jax.jvp(layer, primals, tangents))


def in_shards(stack, x):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P(), P("d")), "out_specs": P("d")}
    return jax.shard_map(functools.partial(by_scan, layer), mesh=mesh, **specs)(stack, x)


def in_a_loop(stack, x):
    body = lambda i, x: layer(jax.lax.dynamic_index_in_dim(stack, i, keepdims=False), x)
    return jax.lax.fori_loop(0, len(stack), body, x)


STACKED = {
    "scan": functools.partial(by_scan, layer),
    "remat": jax.checkpoint(functools.partial(by_scan, jax.checkpoint(layer))),
    "vmap": jax.vmap(functools.partial(by_scan, layer), in_axes=(None, 0)),
    "loop": in_a_loop,
    "custom_vjp": functools.partial(by_scan, with_author_derivative),
    "custom_jvp": functools.partial(by_scan, with_author_tangent),
    "shard_map": in_shards,
    "scaled": lambda stack, x: by_scan(layer, stack * -2 / 2, -x),
}


def stacked(run):
    stack, x = normal(1, 3, D, D) / 2, inputs_of_size(2, N, D)
    sign = -1 if run is STACKED["scaled"] else 1
    inputs, h = [x], np.tanh(x @ stack[0])  # two signs cancel
    for w in stack[1:]:
        inputs.append(h)
        h = np.tanh(h @ (sign * w))
    return Program(lambda params, x: run(params["w"], x), {"w": stack}, (x,), {"w": inputs})


PROGRAMS |= {name: functools.partial(stacked, run) for name, run in STACKED.items()}


@program
def attention_kernels_of_three_axes():
    params = {
        "query": normal(1, D, 2, 3),
        "out": normal(2, 2, 3, D),
    }

    def fn(params, x):
        h = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, params["query"]))
        return jnp.einsum("bthk,hkd->btd", h, params["out"])

    x = inputs_of_size(3, 8, 5, D)
    h = np.tanh(np.einsum("btd,dhk->bthk", x, params["query"]))
    return Program(fn, params, (x,), {"query": [x], "out": [h.reshape(8, 5, 6)]})


def convolution(padding):
    params = {"kernel": normal(1, 3, 2, 2, 4)}
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (2, 1), padding, dimension_numbers=numbers
        )

    x = inputs_of_size(2, 5, 7, 6, 2)
    windows = jax.lax.conv_general_dilated_patches(
        x, (3, 2), (2, 1), padding, dimension_numbers=numbers
    )  # channels first in each window
    windows = np.asarray(windows).reshape(-1, 2, 6).swapaxes(-1, -2).reshape(-1, 12)
    return Program(fn, params, (x,), {"kernel": [windows]})


@program
def convolution_with_padding():
    return convolution("SAME")


@program
def convolution_without_padding():
    return convolution("VALID")


@program
def experts_meet_their_own_rows():
    params = {"w": normal(1, 2, D, 4)}

    def fn(params, x, sizes):
        return jax.lax.ragged_dot(x, params["w"], sizes)

    x, sizes = inputs_of_size(2, N, D), jnp.array([15, 20])  # the last rows are no one's
    return Program(fn, params, (x, sizes), {"w": [x[:15], x[15:35]]})


@program
def weights_in_blocks_and_scaled_along_their_rows():
    """What scales the rows of a weight scales its inputs."""
    params = {"q": normal(1, D, 4), "k": normal(2, D, 3)}
    rows = np.arange(1, 1 + D, dtype=np.float32)[:, None]

    def fn(params, x):
        return x @ jnp.concatenate([params["q"], params["k"] * rows], 1)

    x = inputs_of_size(3, N, D)
    return Program(fn, params, (x,), {"q": [x], "k": [x * rows.T]})


@program
def weights_one_below_the_other():
    params = {"left": normal(1, D, 4), "right": normal(2, 5, 4)}

    def fn(params, x):
        return x @ jnp.concatenate([params["left"], params["right"]], 0)

    x = inputs_of_size(3, N, D + 5)
    return Program(fn, params, (x,), {"left": [x[:, :D]], "right": [x[:, D:]]})
