"""Every program of the table on a quantized base: as on the base that it stands for."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax.core.quantized.weight import is_quantized, quantize_array
from tests.engine.test_programs import assert_close, loss, prepare
from tests.programs import CASES, DENSE_CASES, a_few, is_node
from tests.programs.tiny_kinds import TINY, fitting

ALL = CASES + DENSE_CASES

#: Programs whose codes cannot be passed on, so that the weight is dequantized with a warning.
DEQUANTIZED = {
    *("cond_chooses_a_weight", "switch_chooses_a_weight_and_more"),  # one branch scales its weight
    "custom_jvp_of_a_weight_that_an_input_scales",
}

#: Programs that divide blocks of some kinds.
DIVIDES_BLOCKS = {
    "entries_picked_from_both_axes",
    "shard_map_in_a_shard_map",
    "shard_map_that_gathers_its_weights",
}


def quantize(params, axis, kind):
    """Quantize every weight along its first in axis, or its last axis; see `kind_of`."""

    def one(node):
        if not is_node(node):
            return node
        at = node.layout.axes.index("i") if axis == "in" else -1
        return dataclasses.replace(node, w=quantize_array(node.w, kind_of(kind, node.w, at), at))

    return jax.tree.map(one, params, is_leaf=is_node)


def kind_of(kind, w, axis):
    """Return this kind where its blocks divide the axis, else int8; of a number one that fits."""
    found = fitting(w.shape[axis])
    if isinstance(kind, int):
        return found[kind % len(found)]
    return kind if kind in found else "int8"


def dequantize(params):
    return jax.tree.map(
        lambda w: w.dequantize() if is_quantized(w) else w, params, is_leaf=is_quantized
    )


def derived(case, model, params, args):
    """Return outputs and gradients, or tangents where there is no reverse mode."""
    base, adapters = lora_jax.split(params)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in args]
    inputs = [x for x, moves in zip(args, floating, strict=True) if moves]

    def value(adapters, inputs):
        values = iter(inputs)
        given = [next(values) if moves else x for x, moves in zip(args, floating, strict=True)]
        outs = model(lora_jax.join(base, adapters), *given)
        return loss(outs), outs

    if not case.differentiable:
        return value(adapters, inputs)[1]
    if case.reverse:
        return jax.grad(value, (0, 1), has_aux=True)(adapters, inputs)
    point = (adapters, inputs)
    return jax.jvp(value, point, jax.tree.map(jnp.cos, point))


def check(case, axis, kind):
    fn, _, params, args = prepare(case, jnp.float64)
    quantized = quantize(params, axis, kind)
    run = functools.partial(derived, case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = jax.jit(lambda *x: run(lora_jax.lora(fn), *x))(quantized, args)
    dense = any(w.category is lora_jax.DenseWarning for w in caught)
    if case.dense or case.name in DEQUANTIZED:
        assert dense
    elif case.name not in DIVIDES_BLOCKS and (axis == "last" or not looks_up(params)):
        assert not dense  # a lookup across blocks would dequantize the table
    plain = lora_jax.lora(fn, on_dense="allow")
    assert_close(got, jax.jit(lambda *x: run(plain, *x))(dequantize(quantized), args), 1e-10)


def looks_up(params):
    nodes = jax.tree.leaves(params, is_leaf=is_node)
    return any("gather" in node.layout.uses for node in nodes if is_node(node))


@pytest.mark.parametrize("case", a_few(ALL), ids=str)
def test_equals_the_dequantized_base(case, x64, quick_compile):
    """Blocks lie along the inputs of one half of the programs, along the last axis of the other."""
    check(case, "in" if len(case.name) % 2 else "last", len(case.name) // 2)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["in", "last"])
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_equals_the_dequantized_base_of_every_kind(case, kind, axis, x64, quick_compile):
    check(case, axis, kind)
