"""The base is there once: no array of it per slot, and its products are one for all slots."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.core.quantized.weight import quantize_array

# Sizes that no other axis has: a type in the program tells whose it is.
LAYERS, WIDTH, HIDDEN, TOKENS = 2, 14, 22, 3
RUNS = [
    lora.Run(learning_rate=1e-2, rank=1),
    lora.Run(learning_rate=1e-2, rank=2, dora=True),
    lora.Run(learning_rate=1e-2, rank=4, dropout=0.1),
    lora.Run(learning_rate=1e-2, rank=5),
    lora.Run(learning_rate=1e-2, rank=3),
]
SLOTS = len(RUNS)


def layer(x, weights):
    return jnp.tanh(jnp.tanh(x @ weights["up"]) @ weights["down"]), None


def unrolled(params, x):
    for i in range(LAYERS):
        x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], params))
    return (x**2).mean()


def scanned(params, x):
    return (jax.lax.scan(layer, x, params)[0] ** 2).mean()


def rematerialized(params, x):
    return (jax.lax.scan(jax.checkpoint(layer), x, params)[0] ** 2).mean()


def make_sweep(model, kind=None):
    keys = jax.random.split(jax.random.key(0), 2)
    base = {
        "up": jax.random.normal(keys[0], (LAYERS, WIDTH, HIDDEN)),
        "down": jax.random.normal(keys[1], (LAYERS, HIDDEN, WIDTH)),
    }
    if kind is not None:
        base = {name: quantize_array(w, kind, -2) for name, w in base.items()}
    x = jax.random.normal(jax.random.key(1), (TOKENS, WIDTH))
    config = lora.LoraConfig(targets=["up", "down"])
    return lora.sweep(lora.lora(model), base, RUNS, config, x), base, x


@pytest.mark.parametrize(
    ("model", "kind"),
    [(unrolled, None), (scanned, "int8"), (rematerialized, None), (rematerialized, "int8")],
)
def test_no_array_of_the_base_is_made_per_slot(model, kind):
    sweep, base, x = make_sweep(model, kind)
    text = jax.jit(sweep.update).lower(base, jax.eval_shape(sweep.init), x).as_text()
    types = {tuple(map(int, dims.split("x")[:-1])) for dims in re.findall(r"tensor<([^>]+)>", text)}
    weights = [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]
    per_slot = [t for t in types if SLOTS in t and any(_contains(t, w) for w in weights)]
    assert per_slot == []
    # The weight meets the activations of all slots at once; so it does in the backward pass.
    products = re.findall(r"stablehlo.dot_general (.*?) : \((.*?), (.*?)\) ->", text)
    of_base = [
        options
        for options, *operands in products
        if any(_dims(t) in weights for t in operands)
        and any(SLOTS in _dims(t) and TOKENS in _dims(t) for t in operands)
    ]
    assert len(of_base) >= 2 and not any("batching_dims" in options for options in of_base)


def operations(model, layers, batch_axes):
    """The FLOPs of a step, before the compiler has changed anything."""
    base = {"up": jnp.ones((LAYERS, WIDTH, HIDDEN)), "down": jnp.ones((LAYERS, HIDDEN, WIDTH))}
    x = jnp.ones((TOKENS, WIDTH))
    if model is unrolled:
        base = [jax.tree.map(lambda w, i=i: w[i], base) for i in range(LAYERS)]
        model = lambda params, x: (layer(layer(x, params[0])[0], params[1])[0] ** 2).mean()
    config = lora.LoraConfig(layers=layers)
    sweep = lora.sweep(lora.lora(model), base, RUNS[3:], config, x, batch_axes=batch_axes)
    x = x if batch_axes is None else jnp.stack([x, x])
    lowered = jax.jit(sweep.update).lower(base, jax.eval_shape(sweep.init), x)
    text = lowered.as_text()
    return sum(
        2 * np.prod(_dims(result)) * _dims(left)[int(axis)]
        for axis, left, result in re.findall(
            r"dot_general .*?contracting_dims = \[(\d+)\].*?: \((tensor<\S+>), .*?\) -> (\S+)", text
        )
    )


def test_what_all_runs_have_in_common_is_computed_once():
    product = 2 * TOKENS * WIDTH * HIDDEN
    shared, apart = (operations(unrolled, None, axes) for axes in (None, 0))
    assert apart - shared == product  # the base's part of the first product, of one of two runs
    shared, apart = (operations(unrolled, [1], axes) for axes in (None, 0))
    assert apart - shared == 3 * product  # and the whole layer that is not adapted
    shared, apart = (operations(scanned, None, axes) for axes in (None, 0))
    assert apart == shared


def _dims(type_):
    return tuple(map(int, re.search(r"tensor<((?:\d+x)*)", type_)[1].split("x")[:-1]))


def _contains(shape, part):
    return any(shape[i : i + len(part)] == part for i in range(len(shape)))
