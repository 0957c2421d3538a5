"""Views of a quantized base pass codes and scales on: no array of a weight's size is made."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax.core.dora import column_norms
from lora_jax.core.quantized.parts import slice_weight
from lora_jax.core.quantized.weight import is_quantized, quantize_array
from tests.programs import normal
from tests.programs.jaxprs import equations

D, OUT, LAYERS = 64, 128, 3
F32 = jnp.float32
X = normal(0, (5, D), F32)

# name: (function of (w, x), kind, axis of the blocks); w is [layers, in, out]
VIEWS = {
    "transposed": (lambda w, x: x @ w[0].T.reshape(OUT, D).T, "nf4", 1),
    "heads": (lambda w, x: jnp.einsum("bd,dhk->bhk", x, w[1].reshape(D, 4, OUT // 4)), "nf4", 1),
    "blocks apart": (lambda w, x: x[:, :32] @ w[1].reshape(2, 32, OUT)[1], "int4", 1),
    "blocks joined": (lambda w, x: x[:3] @ w.reshape(LAYERS * D, OUT)[D : 2 * D], "int4", 1),
    "one scale": (lambda w, x: x[:, :16] @ w[1].reshape(4, 16, OUT)[2][:, ::-1], "int8", 1),
    "columns": (lambda w, x: x @ w[2][:, 16:80:2], "nf4", 1),
    "rows in whole blocks": (lambda w, x: x[:, 32:] @ w[2][32:], "int4", 1),
    "parts": (lambda w, x: sum(x @ part for part in jnp.split(w[0], 4, 1)), "nf4", 1),
    "unpacked": (lambda w, x: sum(jnp.sin(x @ layer) for layer in w), "nf4", 1),
    "narrow": (lambda w, x: x.astype("bfloat16") @ w[1].astype("bfloat16"), "nf4", 1),
    "scaled": (lambda w, x: x @ (-w[1] * 2 / 3), "int4", 1),
    "scan": (lambda w, x: lax.scan(lambda h, w: (jnp.sin(h @ w @ w.T), None), x, w)[0], "nf4", 1),
    "scan after a cast": (
        lambda w, x: lax.scan(
            lambda h, w: (jnp.sin(h @ w @ w.T), None), x, w.swapaxes(0, 1).swapaxes(0, 1) * 0.5
        )[0],
        *("nf4", 2),
    ),
    "picked in a loop": (
        lambda w, x: lax.fori_loop(0, LAYERS, lambda i, h: jnp.sin(h @ w[i] @ w[i].T), x),
        *("int8", 1),
    ),
    "concatenated": (lambda w, x: x @ jnp.concatenate([w[0], w[1]], 1), "nf4", 1),
    "concatenated blocks": (lambda w, x: jnp.tile(x, 2) @ jnp.concatenate([w[0], w[1]]), "int4", 1),
    "stacked": (lambda w, x: jnp.einsum("bd,ndo->bno", x, jnp.stack([w[2], w[0]])), "nf4", 1),
    "chosen": (lambda w, x: x @ lax.cond(x[0, 0] > 0, lambda: w[0], lambda: w[1]), "nf4", 1),
    "mapped": (lambda w, x: jax.vmap(lambda w: jnp.sin(x @ w))(w), "int4", 1),
    "waits for its product": (lambda w, x: jnp.pad(x, ((0, 0), (1, 1))) @ _padded(w[0]), "nf4", 1),
    "across blocks": (lambda w, x: x[:, :32] @ w[0].reshape(32, 2 * OUT), "nf4", 1),
    "unlike": (lambda w, x: x @ jnp.concatenate([w[0] * 2, w[1]], 1), "nf4", 1),
    "rows": (lambda w, x: w[1][jnp.argsort(x[:, :7], 1)] @ jnp.ones(OUT), "nf4", 2),
    "rows, filled": (
        lambda w, x: jnp.take(w[1], jnp.argsort(x, 1)[:, :9] * 2, 0, fill_value=3.0),
        *("nf4", 2),
    ),
    "a row": (lambda w, x: lax.dynamic_slice(w[1], (x.argmax(), 0), (1, OUT)), "nf4", 2),
}

#: Factors of adapters are not joined so.
WITHOUT_ADAPTERS = {"across blocks", "blocks joined"}


def _padded(w):
    return lax.pad(w, np.float32(0), ((1, 1, 0), (0, 0, 0)))


def weights(adapted):
    """Return, by kind and axis, a quantized weight, with or without adapters."""

    def one(kind, axis):
        w = quantize_array(normal(1, (LAYERS, D, OUT), F32), kind, axis)
        a, b = normal(2, (LAYERS, D, 2), F32, 0.2), normal(3, (LAYERS, 2, OUT), F32)
        node = lora_jax.LoraWeight(w, a, b, jnp.ones(LAYERS), layout=lora_jax.Layout("bio"))
        return node if adapted else w

    return {f"{kind} {axis}": one(kind, axis) for _, kind, axis in VIEWS.values()}


def on(fn, kind, axis):
    """Return the program of a row as a function of all weights."""
    return lora_jax.lora(lambda weights, x: fn(weights[f"{kind} {axis}"], x), on_dense="error")


def dequantized(tree):
    return jax.tree.map(
        lambda w: w.dequantize() if is_quantized(w) else w, tree, is_leaf=is_quantized
    )


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_views_move_codes(adapted, quick_compile):
    made = weights(adapted)
    views = {n: row for n, row in VIEWS.items() if not adapted or n not in WITHOUT_ADAPTERS}

    def loss(x, made):
        outs = {name: on(*row)(made, x) for name, row in views.items()}
        return sum(jnp.sin(out).sum() for out in jax.tree.leaves(outs)), outs

    derive = jax.value_and_grad(loss, has_aux=True) if adapted else loss
    both = lambda *args: [derive(X, made) for made in args]
    got, want = jax.jit(both)(made, dequantized(made))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    for name, row in views.items():
        program = jax.make_jaxpr(on(*row))(made, X)
        made_in_it = [var.aval for eqn in equations(program.jaxpr) for var in eqn.outvars]
        large = [x for x in made_in_it if math.prod(x.shape) >= D * OUT]
        assert not [x for x in large if jnp.issubdtype(x.dtype, jnp.floating)], name


def test_a_function_can_be_exported():
    """Codes are arguments of the exported program, and its tree names their kind."""
    fn = lora_jax.lora(lambda params, x: jnp.tanh(x @ params["w"]))
    params = {"w": quantize_array(normal(1, (D, 3), jnp.bfloat16), "nf4", 0)}
    stored = export.export(jax.jit(fn))(params, X).serialize()
    np.testing.assert_array_equal(
        export.deserialize(stored).call(params, X), jax.jit(fn)(params, X)
    )


def test_slices_of_blocks():
    values = normal(1, (3, D), F32)
    w = quantize_array(values, "int4", 1)
    part = slice_weight(w, [(0, 3, 2), (32, 64, 1)])
    np.testing.assert_array_equal(part.dequantize(), w.dequantize()[::2, 32:])
    assert slice_weight(w, [(0, 3, 1), (16, 48, 1)]) is None
    loose = quantize_array(values, "int8", 1)
    part = slice_weight(loose, [(1, 2, 1), (5, 60, 3)])
    np.testing.assert_array_equal(part.dequantize(), loose.dequantize()[1:2, 5:60:3])


def test_trained_rows_read_their_own_codes(monkeypatch):
    """The rows of a table are dequantized alone, where blocks lie along its embed axis."""
    table = quantize_array(normal(1, (40, D), F32), "int4", 1)
    node = lora_jax.TrainedRows(
        *(table, normal(2, (2, D), F32), jnp.ones(())),
        rows=(3, 17),
        axis=0,
        layout=lora_jax.Layout("io"),
    )
    np.testing.assert_array_equal(node.select(table), table.dequantize()[jnp.array([3, 17])])
    fn = lambda table, ids: jnp.tanh(table[ids])
    ids = jnp.array([[3, 5], [17, 3]])
    plain = table.dequantize().at[jnp.array([3, 17])].set(node.value)
    got = lora_jax.lora(fn, on_dense="error")(node, ids)
    np.testing.assert_allclose(got, fn(plain, ids), rtol=1e-5)
    made = jax.make_jaxpr(lora_jax.lora(fn))(node, ids)
    sizes = [math.prod(v.aval.shape) for e in equations(made.jaxpr) for v in e.outvars]
    assert max(sizes) < 40 * D


def test_norms_of_dora_are_computed_one_after_another(optimized):
    """Otherwise a program would hold the values of all its weights at its start."""
    width, layers = 128, 6
    fn = lambda params, x: functools.reduce(lambda x, w: x + jnp.sin(x @ w), params, x)
    values = [normal(i, (width, width), F32) for i in range(layers)]
    params, x = [quantize_array(w, "int8", 0) for w in values], normal(7, (4, width), F32)
    config = lora_jax.LoraConfig(2, dora=True)
    base, adapters = lora_jax.split(lora_jax.init(jax.random.key(0), params, config, fn, x))
    loss = lambda adapters, base: lora_jax.lora(fn)(lora_jax.join(base, adapters), x).sum()
    step = jax.jit(jax.value_and_grad(loss))
    ours, plain = (step.lower(adapters, b).compile() for b in (base, dequantized(base)))
    bytes_of = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    assert bytes_of(ours) < bytes_of(plain) + 3 * 4 * width**2
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, ours(adapters, base), plain(adapters, dequantized(base)))


def test_norms_where_blocks_lie_along_the_axis_of_layers():
    w = quantize_array(normal(1, (4, 3, 2), F32), "int8", 0)
    a, b = normal(2, (4, 3, 1), F32), normal(3, (4, 1, 2), F32)
    node = lora_jax.LoraWeight(w, a, b, jnp.ones(4), layout=lora_jax.Layout("bio"))
    want = np.linalg.norm(np.asarray(w.dequantize() + a @ b), axis=1)
    np.testing.assert_allclose(column_norms(node), want, rtol=1e-5)


def test_a_view_that_is_on_every_device_meets_a_sharded_activation():
    """Inside a `shard_map` JAX makes the view vary; the codes are dequantized before that."""
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    body = lambda w, x: jnp.einsum("ta,ba->tb", x, jnp.broadcast_to(w, (3, 8)))
    fn = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    w = quantize_array(normal(1, (1, 8), F32), "int8", axis=1)
    x = normal(2, (4, 8), F32)
    got = jax.jit(lora_jax.lora(fn, on_dense="error"))(w, x)
    np.testing.assert_allclose(got, fn(w.dequantize(), x), atol=1e-6)
