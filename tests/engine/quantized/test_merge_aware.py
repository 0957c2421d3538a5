"""Merge-aware adapters: the program on requantized sums, with the gradient of the sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, LoraConfig, LoraWeight, TrainedLeaf, TrainedRows
from lora_jax.core.quantized.kinds import KINDS, WRITABLE
from lora_jax.core.quantized.weight import is_quantized, quantize_array
from tests.devices import assert_same
from tests.engine.quantized.test_products import layers, quantize, scanned, unrolled

WIDTH = 128
X = jax.random.normal(jax.random.key(3), (8, WIDTH))
DEFAULT = ((unrolled, "int8"),)
EVERY = [
    pytest.param(fn, kind, marks=[] if (fn, kind) in DEFAULT else pytest.mark.slow)
    for fn in (unrolled, scanned)
    for kind in WRITABLE
    if (KINDS[kind].block or 1) <= WIDTH
]


def is_node(x):
    return isinstance(x, LoraWeight | TrainedRows | TrainedLeaf)


def trained(params, fn, *args, **config):
    """Return the base and adapters that are not zero."""
    full = lora_jax.init(jax.random.key(1), params, LoraConfig(rank=4, **config), fn, *args)
    base, adapters = lora_jax.split(full)
    noise = lambda a: a + 0.1 * jax.random.normal(jax.random.key(2), a.shape)
    keep = lambda old, new: jax.tree.map(lambda o, n: o if o.ndim < 2 else n, old, new)
    return base, keep(adapters, jax.tree.map(noise, adapters))


def by_hand(kind=None):
    """Return what a node means: Q of the dense sum, and a gradient straight through Q."""

    def one(node):
        if not is_node(node) or not is_quantized(node.w):
            return lora_jax.merge(node) if is_node(node) else node
        w = node.w.dequantize().astype(jnp.float32)
        if isinstance(node, TrainedLeaf):
            total = node.value
        elif isinstance(node, TrainedRows):
            total = node.replace(w, node.value)
        else:
            axes, letters = node.layout.axes, "xyzw"
            sub = lambda kinds: "".join(
                c for c, k in zip(letters, axes, strict=False) if k in kinds
            )
            sum_of = f"{sub('b')}{sub('i')}r,{sub('b')}r{sub('o')}->{sub('bio')}"
            scale = jax.lax.stop_gradient(node.scale.reshape(-1)[0])  # the same for all layers
            total = w + scale * jnp.einsum(sum_of, node.a, node.b)
            if node.magnitude is not None:  # [..., in, out]
                norms = jax.lax.stop_gradient(jnp.linalg.norm(total, axis=-2, keepdims=True))
                total = total / norms * node.magnitude[..., None, :]
        rounded = quantize_array(total, kind or node.w.kind, node.w.axis).dequantize()
        return (total + jax.lax.stop_gradient(rounded - total)).astype(node.w.dtype)

    return lambda tree: jax.tree.map(one, tree, is_leaf=is_node)


def assert_trains_what_is_served(fn, base, adapters, *args, kind=True, tolerance=2e-6, **options):
    """Compare outputs and gradients with the hand-written form, and outputs with the merge."""

    def loss(fn, adapters, x):
        y = fn(lora_jax.join(base, adapters), x, *args[1:])
        return jnp.sin(y).sum(), y

    @jax.jit
    def both(adapters, x):
        aware = lora_jax.lora(fn, merge_aware=kind, **{"on_dense": "error", **options})
        rounded = by_hand(None if kind is True else kind)
        oracle = lambda params, *args: fn(rounded(params), *args)
        grad = jax.value_and_grad(loss, (1, 2), has_aux=True)
        merged = lora_jax.merge(lora_jax.join(base, adapters), requantize=kind)
        return (
            grad(aware, adapters, x),
            grad(oracle, adapters, x),
            lora_jax.lora(fn, on_dense="allow")(merged, x, *args[1:]),
        )

    ((_, y), got), ((_, wanted), want), served = both(adapters, args[0])
    assert max(abs(x).max() for x in jax.tree.leaves(got[0])) > 1e-3
    for g, w in zip(jax.tree.leaves((got, y)), jax.tree.leaves((want, wanted)), strict=True):
        size = np.linalg.norm(np.asarray(w, np.float64))
        assert np.linalg.norm(np.asarray(g, np.float64) - w) <= tolerance * size
    np.testing.assert_allclose(y, served, atol=tolerance * abs(served).max())


@pytest.mark.parametrize(("fn", "kind"), EVERY)
def test_equals_the_hand_written_form(fn, kind):
    # A sum that lies halfway between two codes may be rounded either way.
    tolerance = 1e-3 if kind == "int8_zero" else 5e-6
    base, adapters = trained(quantize(layers(fn is scanned), kind), fn, X)
    assert_trains_what_is_served(fn, base, adapters, X, tolerance=tolerance)


@pytest.mark.slow
def test_with_a_magnitude():
    # The norms are summed in another order than by hand, so a sum that lies halfway between two
    # codes may be rounded either way: one code of 256 moves the gradient by 1.4e-4.
    base, adapters = trained(quantize(layers(stacked=True), "int8"), scanned, X, dora=True)
    assert_trains_what_is_served(scanned, base, adapters, X, tolerance=1e-3)


@pytest.mark.slow
def test_to_another_kind():
    base, adapters = trained(quantize(layers(stacked=False), "int8"), unrolled, X)
    assert_trains_what_is_served(unrolled, base, adapters, X, kind="int4", tolerance=5e-6)


def weight(seed, *shape, dtype=jnp.float32):
    return (jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5).astype(dtype)


def transposed(params, x):
    return x @ params["w"].T @ params["w"]


def half_precision(params, x):
    return (x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32)


def altered(params, x):
    return x @ (params["w"] * jnp.tanh(params["w"]))


def halves(params, x):
    left, right = jnp.split(params["w"], 2, 1)
    return x @ left + x @ right @ right.T @ left


def joined(params, x):
    return x @ jnp.concatenate([params["w"], params["v"]], 1)


def experts(params, x):
    return jnp.einsum("eti,eio->eto", jnp.stack([x, 2 * x]), params["stack"])


def ragged(params, x):
    return jax.lax.ragged_dot(x, params["stack"], jnp.array([5, 3]))


def convolution(params, x):
    image = x.reshape(1, 2, 4, WIDTH)
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        image, params["kernel"], (1, 1), "SAME", dimension_numbers=dims
    )


def embedded(params, x):
    return jnp.take(params["w"], jnp.arange(8) * 5 % 7, 0) * x


PROGRAMS = {
    transposed: ("error", 5e-6),
    halves: ("error", 5e-6),
    joined: ("error", 5e-6),
    half_precision: ("error", 2e-2),
    altered: ("allow", 5e-6),
    experts: ("error", 5e-6),
    ragged: ("error", 5e-6),
    convolution: ("error", 5e-6),
    embedded: ("allow", 5e-6),
}
FAST = (transposed, altered)


@pytest.mark.parametrize(
    "fn",
    [pytest.param(fn, marks=[] if fn in FAST else pytest.mark.slow) for fn in PROGRAMS],
    ids=lambda fn: fn.__name__,
)
def test_uses_of_every_form(fn):
    params = {"w": weight(1, WIDTH, WIDTH), "v": weight(2, WIDTH, 64)}
    params |= {"stack": weight(3, 2, WIDTH, 64), "kernel": weight(4, 3, 3, WIDTH, 16)}
    used = {name: w for name, w in params.items() if name in fn.__code__.co_consts}
    quantized = jax.tree.map(lambda w: quantize_array(w, "int4", -2), used)
    base, adapters = trained(quantized, fn, X, targets=list(used))
    on_dense, tolerance = PROGRAMS[fn]
    assert_trains_what_is_served(fn, base, adapters, X, on_dense=on_dense, tolerance=tolerance)


def test_whole_leaves_and_rows():
    def fn(params, x):
        return jnp.take(params["table"], jnp.arange(8) % 3, 0) * x @ params["w"]

    params = quantize({"table": weight(1, WIDTH, WIDTH), "w": weight(2, WIDTH, WIDTH)}, "int8")
    scale, layout = jnp.float32(1), lora_jax.Layout("io")
    table = TrainedRows(
        params["table"], weight(5, 2, WIDTH), scale, rows=(0, 2), axis=0, layout=layout
    )
    leaf = TrainedLeaf(params["w"], weight(6, WIDTH, WIDTH), scale)
    base, adapters = lora_jax.split({"table": table, "w": leaf})
    assert_trains_what_is_served(fn, base, adapters, X, on_dense="allow", tolerance=5e-6)


def test_before_training_and_switched_off_it_is_the_base_to_the_bit():
    """Also where requantizing would choose other codes: here no code is the largest."""
    half = lambda c: (c // 2).astype(c.dtype) if c.dtype == jnp.int8 else c
    params = jax.tree.map(half, quantize(layers(stacked=True), "int8"))
    full = lora_jax.init(jax.random.key(1), params, LoraConfig(rank=4), scanned, X)
    run = jax.jit(lora_jax.lora(scanned, merge_aware=True))
    plain = jax.jit(lora_jax.lora(scanned))(params, X)
    assert_same(run(full, X), plain)
    base, adapters = lora_jax.split(full)
    moved = lora_jax.join(base, jax.tree.map(lambda x: x + 0.1, adapters))
    assert_same(run(lora_jax.disable(moved), X), plain)
    assert abs(run(moved, X) - plain).max() > 1e-3


def test_no_array_of_a_weights_size_is_kept():
    params = quantize(layers(stacked=False), "nf4")
    base, adapters = trained(params, unrolled, X)

    def loss(adapters, base, x):
        y = lora_jax.lora(unrolled, merge_aware=True, on_dense="error")(
            lora_jax.join(base, adapters), x
        )
        return (y**2).mean()

    _, pull_back = jax.vjp(lambda a, x: loss(a, base, x), adapters, X)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.size >= 2 * WIDTH * WIDTH]
    assert all(leaf.dtype == jnp.uint8 for leaf in kept)
    step = jax.jit(jax.value_and_grad(loss, (0, 2)))
    temporary = step.lower(adapters, base, X).compile().memory_analysis().temp_size_in_bytes
    one_layer = 4 * 2 * WIDTH * WIDTH
    assert temporary < 4 * one_layer  # the sum, the values, and their like; of 2 · 3 layers


def test_refusals(monkeypatch):
    params = layers(stacked=False)
    aware = lora_jax.lora(unrolled, merge_aware=True)
    with pytest.raises(ConfigError, match="kind 'nf5' is not one of"):
        lora_jax.lora(unrolled, merge_aware="nf5")
    plain = lora_jax.init(jax.random.key(1), params, LoraConfig(rank=4), unrolled, X)
    with pytest.raises(ConfigError, match=r"no adapted weight has a quantized base.*quantize"):
        aware(plain, X)
    config = LoraConfig(rank=4, dropout=0.1)
    full = lora_jax.init(jax.random.key(1), quantize(params, "int8"), config, unrolled, X)
    with pytest.raises(ConfigError, match=r"0/down has dropout.*dropout=0"):
        aware(lora_jax.with_dropout(full, jax.random.key(0)), X)
    monkeypatch.setitem(KINDS, "int8", dataclasses.replace(KINDS["int8"], encode=None))
    with pytest.raises(ConfigError, match=r"merge_aware: 0/down: int8 can be read .* \"nf4\""):
        aware(full, X)
