"""Initializers that change the base, where the base is or becomes quantized."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import ConfigError, LoraConfig, initializers
from lora_jax.core.quantized.kinds import KINDS
from lora_jax.core.quantized.nf4 import VALUES
from lora_jax.core.quantized.weight import is_quantized, quantize_array
from lora_jax.initializers import rounding
from tests.devices import assert_same
from tests.programs import normal

pytestmark = pytest.mark.usefixtures("quick_compile")
KEY, RANK = jax.random.key(1), 8
W = normal(0, (128, 48), jnp.float32)


def model(params, x):
    return x @ params["w"]


def init(w, how, **fields):
    x = jnp.ones((2, w.shape[-2]))
    config = LoraConfig(rank=RANK, init=how, targets=["w"], **fields)
    return lora_jax.init(KEY, {"w": w}, config, None if w.ndim == 2 else stacked, x)["w"]


def stacked(params, x):
    return jnp.einsum("bti,bio->bto", jnp.stack([x] * len(params["w"])), params["w"])


def update(node):
    return np.asarray(node.scale)[..., None, None] * (np.asarray(node.a) @ np.asarray(node.b))


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_loftq_of_a_kind_by_hand(steps):
    """The paper's algorithm 1 in numpy's SVD, with the codes of each step from the kind itself."""
    node = init(W, initializers.loftq("nf4", steps))
    w, ab = np.asarray(W, np.float64), np.zeros(W.shape)
    for _ in range(steps):
        codes = quantize_array(jnp.asarray(w - ab, jnp.float32), "nf4", 0)
        u, s, v = np.linalg.svd(w - np.asarray(codes.dequantize(), np.float64))
        ab = u[:, :RANK] * s[:RANK] @ v[:RANK]
    assert is_quantized(node.w) and (node.w.kind, node.w.axis) == ("nf4", -2)
    differ = (node.w.fields["codes"] != codes.fields["codes"]).mean()
    assert differ <= (0 if steps == 1 else 0.01)
    lost = np.linalg.norm(np.asarray(node.w.dequantize()) + update(node) - w)
    want = np.linalg.norm(np.asarray(codes.dequantize()) + ab - w)
    np.testing.assert_allclose(lost, want, rtol=1e-5)
    alone = np.linalg.norm(quantize_array(W, "nf4", 0).dequantize() - W)
    assert lost < 0.85 * alone


def test_loftq_of_several_in_axes_and_of_stacked_layers():
    w = normal(2, (2, 64, 24), jnp.float32)
    node = init(w, initializers.loftq("int8", 2))
    for layer in range(2):
        alone = init(w[layer], initializers.loftq("int8", 2))
        got = jax.tree.map(lambda x, layer=layer: x[layer], node.w)
        lost, want = (
            np.linalg.norm(base.dequantize() + sum_ - w[layer])
            for base, sum_ in ((got, update(node)[layer]), (alone.w, update(alone)))
        )
        np.testing.assert_allclose(lost, want, rtol=1e-5)
    heads = {"out": normal(3, (4, 64, 24), jnp.float32)}  # [heads, head_dim, embed]

    def attention(params, x):
        return jnp.einsum("thd,hde->te", x, params["out"])

    config = LoraConfig(rank=RANK, init=initializers.loftq("nf4", 2))
    node = lora_jax.init(KEY, heads, config, attention, jnp.ones((2, 4, 64)))["out"]
    assert node.layout.axes == "iio" and (node.w.axis, node.w.shape) == (-2, (4, 64, 24))
    dense = update(dataclasses.replace(node, a=node.a.reshape(256, RANK))).reshape(4, 64, 24)
    lost = np.linalg.norm(node.w.dequantize() + dense - heads["out"])
    alone = quantize_array(heads["out"], "nf4", -2).dequantize() - heads["out"]
    assert lost < 0.9 * np.linalg.norm(alone)


def test_loftq_leaves_other_layers_of_a_stack_as_the_kind_rounds_them():
    w = normal(2, (3, 64, 24), jnp.float32)
    node = init(w, initializers.loftq("int8", 2), layers=[1], layers_pattern="w")
    plain = quantize_array(w, "int8", -2)
    for name, x in node.w.fields.items():
        assert_same(x[jnp.array([0, 2])], plain.fields[name][jnp.array([0, 2])])
        assert (x[1] != plain.fields[name][1]).any()


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("pissa_fast", "olora")]


@pytest.mark.parametrize("how", ["pissa", *SLOW])
def test_a_quantized_base_keeps_its_kind_and_its_residual_is_quantized_again(how):
    w = quantize_array(W, "int8", 0)
    node = init(w, how)
    assert is_quantized(node.w) and (node.w.kind, node.w.axis) == ("int8", w.axis)
    exact = init(w.dequantize(), how)
    np.testing.assert_allclose(node.a, exact.a, atol=1e-4)
    step = np.asarray(node.w.fields["scales"])
    assert (abs(node.w.dequantize() - exact.w) <= 0.51 * step + 1e-4).all()
    want = quantize_array(exact.w, "int8", 0)
    assert (node.w.fields["codes"] != want.fields["codes"]).mean() < 1e-2
    trained = dataclasses.replace(node, w=None, b=node.b + 0.1)
    overlay = lora_jax.on_original({"w": node}, {"w": trained}, {"w": w})
    got = lora_jax.merge(lora_jax.join({"w": w}, overlay))["w"]
    on_changed = lora_jax.merge(dataclasses.replace(trained, w=node.w))
    assert overlay["w"].rank == 2 * RANK
    assert (abs(got - on_changed) <= 0.51 * step + 1e-4).all()  # what quantizing the residual lost


def test_refusals(monkeypatch):
    w = quantize_array(W, "int8", 0)
    for how in ("loftq", initializers.loftq("nf4")):
        with pytest.raises(ConfigError, match=r"w: loftq: the base is quantized already \(int8\)"):
            init(w, how)
    with pytest.raises(ConfigError, match="kind 'nf5' is not one of"):
        initializers.loftq("nf5")
    with pytest.raises(ConfigError, match="function or the name of a kind"):
        initializers.loftq(3)
    with pytest.raises(ConfigError, match=r"w: loftq: blocks of 64 \(nf4\) do not divide axis 0"):
        init(W[:100], initializers.loftq("nf4"))
    monkeypatch.setitem(KINDS, "int8", dataclasses.replace(KINDS["int8"], encode=None))
    with pytest.raises(ConfigError, match=r'w: int8 can be read from files, .* init="kaiming"'):
        init(w, "pissa")


def test_shapes_and_one_table_of_values():
    shapes = {"w": jax.ShapeDtypeStruct(W.shape, W.dtype)}
    config = LoraConfig(rank=RANK, init=initializers.loftq("nf4", 1))
    abstract = lora_jax.init(KEY, shapes, config)["w"]
    real = lora_jax.init(KEY, {"w": W}, config)["w"]
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, real)
    assert rounding.NF4 is VALUES
