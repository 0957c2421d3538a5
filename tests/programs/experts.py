"""Mixture of experts: tokens in groups, each with its own weight."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.programs.table import case, normal


@case(layouts={"up": "bio", "down": "bio"}, vmappable=False)
def ragged_experts(dtype):
    """Tokens sorted by expert; one expert has none, and two tokens have no expert."""

    def fn(params, x, counts):
        h = jnp.tanh(lax.ragged_dot(x, params["up"], counts))
        return lax.ragged_dot(h, params["down"], counts)

    params = {"up": normal(1, (4, 7, 11), dtype), "down": normal(2, (4, 11, 5), dtype)}
    return fn, params, (normal(0, (9, 7), dtype), jnp.array([3, 0, 2, 2]))


@case(layouts={"w": "bio"}, vmappable=False)
def grad_of_ragged_experts(dtype):
    """The backward pass contracts the weight's other axis."""

    def fn(params, x, counts):
        return jax.grad(lambda x: jnp.sin(lax.ragged_dot(x, params["w"], counts)).sum())(x)

    return fn, {"w": normal(1, (3, 7, 5), dtype)}, (normal(0, (6, 7), dtype), jnp.array([3, 1, 2]))


@case(layouts={"w": "bbio"}, vmappable=False)
def ragged_experts_vmapped(dtype):
    """Stacks of experts, tokens and counts, one dimension of them mapped over."""

    def fn(params, x, counts):
        return jnp.tanh(jax.vmap(lax.ragged_dot)(x, params["w"], counts))

    counts = jnp.array([[3, 0, 1], [1, 1, 2]])
    return fn, {"w": normal(1, (2, 3, 7, 5), dtype)}, (normal(0, (2, 4, 7), dtype), counts)
