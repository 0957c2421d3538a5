"""Programs inside programs: jit, remat, scan, loops, branches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tests.programs.table import case, linen, normal


@case(layouts={"kernel": "io"})
def flax_jit(dtype):
    return linen(nn.jit(nn.Dense)(5, param_dtype=dtype), normal(0, (3, 7), dtype))


class Block(nn.Module):
    dtype: Any
    width: int = 7

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(11, param_dtype=self.dtype, name="up")(nn.LayerNorm(param_dtype=self.dtype)(x))
        return x + nn.Dense(self.width, param_dtype=self.dtype, name="down")(nn.silu(h))


@case(layouts={"up/kernel": "io", "down/kernel": "io"})
def flax_remat(dtype):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return linen(nn.remat(Block, policy=policy)(dtype), normal(0, (3, 7), dtype))


@case(layouts={"up/kernel": "io", "down/kernel": "io"})
def flax_remat_nothing_saved(dtype):
    policy = jax.checkpoint_policies.nothing_saveable
    return linen(nn.remat(Block, policy=policy)(dtype), normal(0, (3, 7), dtype))


class Stack(nn.Module):
    dtype: Any
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
        )
        return scan(block(self.dtype, name="block"), x, None)[0]


@case(layouts={"block/up/kernel": "bio", "block/down/kernel": "bio"})
def flax_scan(dtype):
    return linen(Stack(dtype), normal(0, (3, 7), dtype))


@case(layouts={"block/up/kernel": "bio", "block/down/kernel": "bio"})
def flax_scan_remat(dtype):
    return linen(Stack(dtype, remat=True), normal(0, (3, 7), dtype))


@case(layouts={"kernel": "bio"})
def flax_vmap(dtype):
    module = nn.vmap(
        nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, axis_size=3
    )
    return linen(module(5, param_dtype=dtype), normal(0, (3, 4, 7), dtype))


@case(layouts={"shared/kernel": "io"})
def shared_module(dtype):
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(7, param_dtype=dtype, name="shared")
            return layer(jnp.tanh(layer(x)))

    return linen(Shared(), normal(0, (3, 7), dtype))


@case(layouts={"w": "io"})
def scan_broadcast_weights(dtype):
    def fn(params, xs):
        def step(h, x):
            h = jnp.tanh(h @ params["w"] + x)
            return h, h.sum()

        return lax.scan(step, jnp.zeros((3, 7), dtype), xs)

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (5, 3, 7), dtype),)


@case(layouts={"w": "bio"})
def scan_over_stacked_weights(dtype):
    def fn(params, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), h[0]), x, params["w"], reverse=True)

    return fn, {"w": normal(1, (4, 7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "bio"})
def stacked_weights_indexed_in_a_loop(dtype):
    def fn(params, x):
        return lax.fori_loop(0, 4, lambda i, h: jnp.tanh(h @ params["w"][i]), x)

    return fn, {"w": normal(1, (4, 7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"})
def fori_loop_carries_params(dtype):
    def fn(params, x):
        def body(i, carry):
            params, h = carry
            return params, jnp.tanh(h @ params["w"])

        return lax.fori_loop(0, 3, body, (params, x))[1]

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"}, reverse=False)
def while_loop(dtype):
    def fn(params, x):
        def cond(carry):
            return (carry[0] < 3) & ((carry[1] @ params["w"]).sum() < 1e3)

        return lax.while_loop(cond, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"])), (0, x))[1]

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"w": "io"})
def cond(dtype):
    def fn(params, x, flag):
        return lax.cond(flag, lambda: jnp.tanh(x @ params["w"]), lambda: x @ (2 * params["w"]))

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype), jnp.array(True))


@case(layouts={"w": "io"})
def switch(dtype):
    def fn(params, x, i):
        branches = [lambda w, x: x @ w, lambda w, x: jnp.sin(x @ w), lambda w, x: x[:, :5] * 3]
        return lax.switch(i, branches, params["w"], x)

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype), jnp.array(1))


@case(layouts={"first": "io", "second": "io"})
def cond_chooses_a_weight(dtype):
    def fn(params, x, flag):
        first, second = params["first"], params["second"]
        w = lax.cond(flag, lambda: first, lambda: -second.reshape(7, 5))
        return jnp.tanh(x @ w)

    params = {"first": normal(1, (7, 5), dtype), "second": normal(2, (7, 5), dtype)}
    return fn, params, (normal(0, (3, 7), dtype), jnp.array(False))


@case(layouts={"first": "oi", "second": "io", "third": "io"})
def switch_chooses_a_weight_and_more(dtype):
    def fn(params, x, i):
        first, second, third = params["first"], params["second"], params["third"]

        def one(x):  # the factors lie the other way round here, so this one is named first
            return third[:7] * 2, x @ second, second

        def two(x):
            return second, x @ second * 2, second

        w, y, whole = lax.switch(i, [one, two], x)
        return x @ w + y + jnp.sin(x @ whole) + x @ first.T

    params = {
        "first": normal(1, (5, 7), dtype),
        "second": normal(2, (7, 5), dtype),
        "third": normal(3, (9, 5), dtype),
    }
    return fn, params, (normal(0, (3, 7), dtype), jnp.array(0))


@case(layouts={"w": "io"})
def one_branch_a_platform(dtype):
    def fn(params, x):
        branches = {"cpu": lambda w, x: jnp.sin(x @ w), "tpu": lambda w, x: x @ w * 2}
        return lax.platform_dependent(params["w"], x, **branches, default=lambda w, x: x @ w)

    return fn, {"w": normal(1, (7, 5), dtype)}, (normal(0, (3, 7), dtype),)


@case(layouts={"a": "io", "b": "io"})
def nested_jit(dtype):
    @jax.jit
    def inner(w, x):
        return jnp.tanh(x @ w)

    @jax.jit
    def outer(params, x):
        return inner(params["b"], inner(params["a"], x)), params["a"].T @ x.T

    params = {"a": normal(1, (7, 5), dtype), "b": normal(2, (5, 3), dtype)}
    return outer, params, (normal(0, (4, 7), dtype),)


@case(layouts={"first/kernel": "io", "second/kernel": "io"})
def nnx_model(dtype):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(7, 11, param_dtype=dtype, rngs=rngs)
            self.norm = nnx.BatchNorm(11, param_dtype=dtype, use_running_average=True, rngs=rngs)
            self.second = nnx.Linear(11, 5, param_dtype=dtype, rngs=rngs)

        def __call__(self, x):
            return self.second(nnx.relu(self.norm(self.first(x))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    return (
        lambda params, x: nnx.merge(graph, params, rest)(x),
        nnx.to_pure_dict(params),
        (normal(0, (3, 7), dtype),),
    )


@case(layouts={"first/kernel": "io", "second/kernel": "io"})
def function_that_is_a_grad(dtype):
    def energy(x, params):
        h = jnp.tanh(x @ params["first"]["kernel"])
        return (jnp.sin(h @ params["second"]["kernel"])).sum()

    params = {
        "first": {"kernel": normal(1, (7, 11), dtype)},
        "second": {"kernel": normal(2, (11, 5), dtype)},
    }
    return (lambda params, x: jax.grad(energy)(x, params), params, (normal(0, (3, 7), dtype),))


@case(layouts={"kernel": "iiio"})
def grad_of_a_convolution(dtype):
    fn, params, (x,) = linen(
        nn.Conv(5, (3, 2), strides=2, param_dtype=dtype), normal(0, (2, 8, 6, 7), dtype)
    )
    return (lambda p, x: jax.grad(lambda x: jnp.sin(fn(p, x)).sum())(x), params, (x,))


@case(layouts={"block/up/kernel": "bio", "block/down/kernel": "bio"})
def grad_of_a_scan_remat(dtype):
    fn, params, (x,) = linen(Stack(dtype, remat=True), normal(0, (3, 7), dtype))
    return (lambda p, x: jax.grad(lambda x: jnp.sin(fn(p, x)).sum())(x), params, (x,))


@case(layouts={"w": "io"})
def function_that_is_a_vmap(dtype):
    return (
        lambda params, x: jax.vmap(lambda row: jnp.tanh(row @ params["w"]))(x),
        {"w": normal(1, (7, 5), dtype)},
        (normal(0, (3, 7), dtype),),
    )


def neumann(product, b):
    """Solve `product(x) = b` by as many terms of a series as its digits need."""
    return lax.fori_loop(0, 40, lambda _, x: b - (product(x) - x), b)


@case(layouts={"w": "oi"})
def linear_solve(dtype):
    """A solver with a derivative of its own, through a checkpoint, and what it says besides."""

    def fn(params, b):
        product = jax.checkpoint(lambda x: x + params["w"] @ x / 50, prevent_cse=False)
        solve = lambda product, b: (neumann(product, b), b.sum())
        return lax.custom_linear_solve(product, b, solve, solve, has_aux=True)

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (7,), dtype),)


@case(layouts={"w": "oi"})
def linear_solve_of_a_symmetric_product(dtype):
    def fn(params, b):
        product = lambda x: x + params["w"].T @ (params["w"] @ x) / 50
        return lax.custom_linear_solve(product, b, neumann, symmetric=True)

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (7,), dtype),)


@case(layouts={"w": "io"})
def linear_transpose_through_a_checkpoint(dtype):
    def fn(params, x):
        policy = jax.checkpoint_policies.dots_saveable
        product = jax.checkpoint(lambda x: params["w"] @ x, policy=policy, prevent_cse=False)
        return jnp.tanh(jax.linear_transpose(product, x)(x)[0])

    return fn, {"w": normal(1, (7, 7), dtype)}, (normal(0, (7,), dtype),)


FLAGS = jnp.array([True, False, True, True])


@case(layouts={"w": "io"})
def cond_per_example(dtype):
    """JAX selects the operands of each branch too, so that no NaN of the other one comes back."""

    def fn(params, x, flags):
        one = lambda w, x: jnp.sqrt(x @ w)
        other = lambda w, x: jnp.sin(x @ w)
        per_example = lambda x, flag: lax.cond(flag, one, other, params["w"], x)
        return jax.vmap(per_example)(jnp.where(flags[:, None, None], x * x, 0), flags)

    params = {"w": abs(normal(1, (7, 5), dtype)) + 9}
    return fn, params, (normal(0, (4, 3, 7), dtype), FLAGS)


@case(layouts={"first": "io", "second": "oi"})
def switch_per_example_chooses_a_weight(dtype):
    def fn(params, x, i):
        ws = params["first"], params["second"].T, 2 * params["first"]
        branches = [lambda w=w: w for w in ws]
        return jax.vmap(lambda x, i: jnp.tanh(x @ lax.switch(i, branches)))(x, i)

    params = {"first": normal(1, (7, 5), dtype), "second": normal(2, (5, 7), dtype)}
    return fn, params, (normal(0, (4, 3, 7), dtype), jnp.array([2, 0, 1, 1]))


@case(layouts={"w": "bio"})
def layers_chosen_from_two_stacks(dtype):
    """The flags are along an axis that both factors have."""

    def fn(params, x, flags):
        w = jnp.where(flags[:, None, None], params["w"], -params["w"])
        return jnp.einsum("eti,eio->eto", x, w)

    return fn, {"w": normal(1, (4, 7, 5), dtype)}, (normal(0, (4, 3, 7), dtype), FLAGS)


@case(layouts={"w": "io"}, dense="select_n")
def rows_of_a_weight_masked(dtype):
    def fn(params, x, flags):
        return x @ jnp.where(flags[:, None], params["w"], -params["w"])

    return fn, {"w": normal(1, (4, 5), dtype)}, (normal(0, (3, 4), dtype), FLAGS)
