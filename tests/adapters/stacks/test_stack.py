"""Overlays of different ranks, targets and kinds as one, and back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora

BASE = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4)), "bias": jnp.ones(4)}


def new(rank, **options):
    config = lora.LoraConfig(rank=rank, **options)
    return jax.jit(lambda key: lora.split(lora.init(key, BASE, config))[1])(jax.random.key(rank))


ADAPTERS = [
    new(1, targets=["up"], dropout=0.1),
    new(3, dora=True),
    new(2, scaling="rslora", alpha=5, train=["bias"]),
]


def test_unstacked_adapters_are_what_was_stacked():
    for got, want in zip(lora.unstack(lora.stack(ADAPTERS)), ADAPTERS, strict=True):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_chosen_adapter_of_scanned_layers_merges(chosen):
    """W + scale · A · B by hand: both have rank 1 or 2 of the stack's 2, in three layers."""
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)}
    scanned = lambda params, x: jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, params["w"])[0]
    overlays = []
    for rank in (1, 2):
        config = lora.LoraConfig(rank=rank, alpha=3)
        node = lora.init(jax.random.key(0), base, config, scanned, jnp.ones((2, 4)))["w"]
        b = jnp.asarray(rng.normal(size=node.b.shape), jnp.float32)
        overlays.append(lora.split({"w": dataclasses.replace(node, b=b)})[1])
    stack = lora.stack(overlays)
    merge = lambda stack, number: lora.merge(lora.join(base, lora.select(stack, number)))["w"]
    a, b = (np.asarray(getattr(overlays[chosen]["w"], x), np.float64) for x in "ab")
    want = np.asarray(base["w"]) + 3 / (chosen + 1) * (a @ b)
    for run in (merge, jax.jit(merge)):
        np.testing.assert_allclose(run(stack, chosen), want, atol=1e-6)


def test_overlays_that_do_not_fit_together_are_all_named():
    other = lora.split(
        lora.init(jax.random.key(0), {"up": jnp.ones((4, 6))}, lora.LoraConfig(rank=2))
    )[1]
    with pytest.raises(lora.StructureError, match=r"bias: adapter 1(.|\n)*down: adapter 1"):
        lora.stack([ADAPTERS[0], other])


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "float32"),
        ("float8_e5m2", "bfloat16", "float32"),
        ("bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_factors_of_two_dtypes_get_one_that_represents_both(first, second, both, strict):
    each = [ADAPTERS[1] | {"up": cast(ADAPTERS[1]["up"], dtype)} for dtype in (first, second)]
    stack = lora.stack(each)
    for field in ("a", "b", "magnitude"):
        assert getattr(stack["up"], field).dtype == both
        for one, got in zip(each, lora.unstack(stack), strict=True):
            want = getattr(one["up"], field).astype(both)
            np.testing.assert_array_equal(getattr(got["up"], field), want)


def cast(node, dtype):
    fields = {name: getattr(node, name).astype(dtype) for name in ("a", "b", "magnitude")}
    return dataclasses.replace(node, **fields)
