"""Every program of the table as a batch of rows with different adapters: each row as if alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests.engine.test_programs import TOLERANCE, assert_close, loss
from tests.programs import CASES, DENSE_CASES, Case, adapt, is_node, merged, normal

IDS = (1, -1, 0, 1)


def other(node, seed):
    """Return an adapter with other numbers."""
    if not is_node(node):
        return node
    changes = {
        name: normal(seed + i, x.shape, x.dtype, 0.5)
        for i, name in enumerate(("a", "b"))
        if (x := getattr(node, name, None)) is not None
    }
    return dataclasses.replace(node, **changes, scale=node.scale * (1 + seed / 100))


def rows_of(x):
    """Return the argument of each row: numbers that differ, and the same integers and flags."""
    each = [x + n / 8 if jnp.issubdtype(x.dtype, jnp.floating) else x for n in range(len(IDS))]
    return jnp.stack(each).astype(x.dtype)


@functools.cache
def prepare(case: Case, dtype):
    """Return the function of a batch, that of a row, the base, two overlays and the arguments."""
    built = case.build(dtype)
    fn, _, args = built
    adapted = [adapt(built, case.layouts, dtype)]
    adapted.append(jax.tree.map(lambda n: other(n, 30), adapted[0], is_leaf=is_node))
    base = lora_jax.split(adapted[0])[0]
    overlays = [lora_jax.split(x)[1] for x in adapted]

    def batch(params, *args):
        # A derivative that someone wrote is for one row; under vmap its dW is a sum over rows. And
        # a callback without a vmap_method is not mapped at all.
        alone = "custom_vjp" in case.name or case.name in ("custom_gradient", "opaque_kernel")
        if case.vmappable and not alone:
            return jax.vmap(fn, (None, *[0] * len(args)))(params, *args)
        return jax.lax.map(lambda args: fn(params, *args), args)

    return batch, fn, base, overlays, tuple(rows_of(jnp.asarray(x)) for x in args)


def frozen(tree):
    freeze = lambda n: dataclasses.replace(n, scale=jax.lax.stop_gradient(n.scale))
    return jax.tree.map(lambda n: freeze(n) if is_node(n) else n, tree, is_leaf=is_node)


def check(case: Case, dtype, forms=None):
    """Compare outputs and gradients (or tangents) with each row on its own merged weights."""
    batch, fn, base, overlays, args = prepare(case, dtype)
    adapted = lora_jax.lora(
        batch,
        adapters_of=np.array(IDS),
        on_dense="allow" if case.dense else "error",
        forms=forms,
    )

    def mixed(overlays, *args):
        return adapted(lora_jax.join(base, lora_jax.stack(overlays)), *args)

    def alone(overlays, *args):
        outs = []
        for row, i in enumerate(IDS):
            params = base if i < 0 else merged(frozen(lora_jax.join(base, overlays[i])))
            outs.append(fn(params, *(x[row] for x in args)))
        return jax.tree.map(lambda *xs: jnp.stack(xs), *outs)

    floats = tuple(x for x in args if jnp.issubdtype(x.dtype, jnp.floating))

    def derive(model):
        def value(overlays, floats):
            values = iter(floats)
            given = [next(values) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in args]
            outs = model(overlays, *given)
            return loss(outs), outs

        if not case.differentiable:
            return value(overlays, floats)[1], ()
        if case.reverse:
            moved, outs = jax.grad(value, (0, 1), has_aux=True)(overlays, floats)
            return outs, moved
        tangents = jax.tree.map(jnp.cos, (overlays, floats))
        (_, outs), (moved, _) = jax.jvp(value, (overlays, floats), tangents)
        return outs, moved

    got, want = jax.jit(lambda: (derive(mixed), derive(alone)))()
    assert_close(got, want, TOLERANCE[jnp.dtype(dtype).name])


BY_DEFAULT = {
    "concatenated_qkv",
    "conv_2d_strided",
    "embed_lookup",
    "ragged_experts",
    "tied_attend",
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.name in BY_DEFAULT else pytest.mark.slow)
        for case in CASES + DENSE_CASES
    ],
    ids=str,
)
def test_each_row_equals_the_row_alone(case, x64, quick_compile):
    check(case, jnp.float64)
