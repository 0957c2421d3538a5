"""Weights picked by number: embeddings, permutations, stacks, and indices out of bounds."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from tests.programs.table import case, normal


@case(layouts={"w": "io"})
def permuted_inputs(dtype):
    """An axis that only A has is picked from, then contracted."""

    def fn(params, x, order):
        return x @ params["w"][order] + x[:, :3] @ params["w"][order[:3]]

    order = jnp.array([3, 0, 6, 2, 5, 1, 4])
    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (4, 7), dtype), order)


@case(layouts={"w": "io"})
def permuted_outputs(dtype):
    def fn(params, x, order):
        return x @ jnp.take(params["w"], order, axis=1), (params["w"][:, order[:2]].T @ x.T).T

    order = jnp.array([3, 0, -1, 2, 1])
    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (4, 7), dtype), order)


@case(layouts={"w": "io"})
def scored_candidates(dtype):
    """The outputs of a head that a batch of ids names, each example its own."""

    def fn(params, x, ids):
        return (
            x @ params["w"] + jnp.pad(jnp.einsum("td,dtk->tk", x, params["w"][:, ids]), (0, 2))[:4]
        )

    ids = jnp.array([[3, 0, 1], [1, 1, 2], [4, 0, 0], [-1, -5, 2]])
    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (4, 7), dtype), ids)


@case(layouts={"fill": "io", "clip": "io", "wrap": "io"})
def lookups_out_of_bounds(dtype):
    def fn(params, ids):
        take = functools.partial(jnp.take, indices=ids, axis=0)
        return (
            take(params["fill"], mode="fill", fill_value=2.5),
            take(params["clip"], mode="clip"),
            take(params["wrap"], mode="wrap"),
        )

    params = {name: normal(i, (7, 5), dtype) for i, name in enumerate(("fill", "clip", "wrap"))}
    return fn, params, (jnp.array([[1, 6, 7, -1], [-7, -8, 20, 0]]),)


@case(layouts={"tables": "iio"})
def stacked_embeddings(dtype):
    """`tables[table, ids]`: one gather along two axes."""

    def fn(params, ids):
        one = params["tables"][1, ids]
        return one + jnp.stack([params["tables"][i, ids + i] for i in range(2)]).sum(0)

    ids = jnp.array([[1, 2, -1], [0, 5, 3]])
    return fn, {"tables": normal(1, (3, 7, 5), dtype)}, (ids,)


@case(layouts={"w": "io"})
def entries_picked_from_both_axes(dtype):
    def fn(params, x, i, j):
        return x @ params["w"], params["w"][i, j], jnp.take_along_axis(params["w"], j[None], 1)

    i, j = jnp.array([0, 6, -1]), jnp.array([4, 0, -2])
    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (4, 7), dtype), i, j)


@case(layouts={"w": "bio"})
def picked_along_a_vmapped_stack(dtype):
    """vmap over the stack itself makes a gather with batching dimensions."""

    def fn(params, x, order):
        return jax.vmap(lambda w, x, order: jnp.tanh(x @ w[order]))(params["w"], x, order)

    order = jnp.array([[3, 0, 6, 2, 5, 1, 4], [1, 2, 4, 5, 0, 6, 3]])
    return fn, {"w": normal(1, (2, 7, 5), dtype)}, (normal(0, (2, 4, 7), dtype), order)


@case(layouts={"w": "ibo"})
def layers_on_an_inner_axis(dtype):
    """A layer's number picks from the second axis, traced and inside remat."""

    def fn(params, x):
        @jax.checkpoint
        def layer(i, h):
            return jnp.tanh(h @ lax.dynamic_index_in_dim(params["w"], i, 1, keepdims=False))

        return lax.fori_loop(0, 3, layer, x)

    return fn, {"w": normal(1, (7, 3, 7), dtype)}, (normal(0, (4, 7), dtype),)


@case(layouts={"w": "io"})
def outputs_in_windows(dtype):
    """A moving window over the outputs, and windows that differ by example."""

    def fn(params, x, starts):
        window = lambda i: lax.dynamic_slice_in_dim(params["w"], i, 2, 1)
        chunks = lax.map(lambda i: x @ window(i), starts)
        return chunks, jax.vmap(lambda row, i: row @ window(i))(x, starts)

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype), jnp.array([0, 3, 4]))
