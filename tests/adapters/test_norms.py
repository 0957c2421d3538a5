"""norms: against the dense update in float64, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, LoraWeight, StructureError, TrainedLeaf, TrainedRows
from tests.programs.jaxprs import equations, squeezed, weight_sized

DORA = {"dora": "io", "dora_stack": "oboi"}
LAYOUTS = {"dense": "io", "query": "ioo", "stack": "bio", "inner": "ibo", "conv": "iiio"} | DORA
SHAPES = {"dense": (7, 9), "query": (7, 3, 4), "stack": (3, 7, 9), "inner": (7, 3, 9)}
SHAPES |= {
    "dora": (7, 9),
    "dora_stack": (4, 3, 5, 7),
    "conv": (3, 3, 4, 5),
    "embedding": (11, 4),
    "bias": (9,),
}


def joined(dtype=np.float32, seed=0):
    """One of every kind of node, its arrays from numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    array = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {}
    for name, axes in LAYOUTS.items():
        layout, shape = Layout(axes), SHAPES[name]
        a, b = array(layout.a_shape(shape, 2)), array(layout.b_shape(shape, 2))
        scale = jnp.asarray(np.full(layout.select("b", shape), 1.5, dtype))
        m = array(layout.magnitude_shape(shape)) if name in DORA else None
        params[name] = LoraWeight(array(shape), a, b, scale, m, layout=layout)
    one = jnp.asarray(1, dtype)
    params["bias"] = TrainedLeaf(array((9,)), array((9,)), one)
    table, value = array(SHAPES["embedding"]), array((2, 4))
    params["embedding"] = TrainedRows(table, value, one, rows=(2, 7), axis=0, layout=Layout("io"))
    return params


def frobenius(x, axes=""):
    x = np.asarray(x, np.float64)
    kept = [i for i, letter in enumerate(axes) if letter == "b"]
    return np.sqrt((x**2).sum(tuple(i for i in range(x.ndim) if i not in kept)))


def scaled_product(node):
    """scale · A · B by matrices, one for each layer, the batch axes in front."""
    n, rank = node.layout.axes.count("b"), node.a.shape[-1]
    stack = node.a.shape[:n]
    a, b = node.a.reshape(*stack, -1, rank), node.b.reshape(*stack, rank, -1)
    return a @ b * node.scale[..., None, None]


def directed(node):
    """What DoRA adds to W: m·V/‖V‖ − W, one matrix for each layer."""
    axes = node.layout.axes
    order = [i for kind in "bio" for i, letter in enumerate(axes) if letter == kind]
    stack = node.a.shape[: axes.count("b")]
    product = scaled_product(node)
    w = node.w.transpose(order).reshape(product.shape)
    total = w + product
    unit = total / np.sqrt((total**2).sum(-2, keepdims=True))
    return node.magnitude.reshape(*stack, 1, -1) * unit - w


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
def test_against_the_dense_update(dtype, x64, quick_compile):
    params = joined(dtype)
    grads = joined(dtype, seed=1)
    got = jax.jit(lora_jax.norms)(params, grads)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    assert set(got) == set(SHAPES)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for path, axes in LAYOUTS.items():
        node, grad = params[path], grads[path]
        update = directed(wide[path]) if path in DORA else scaled_product(wide[path])
        batch = "b" * axes.count("b")
        want = {
            "a": frobenius(node.a, batch),
            "b": frobenius(node.b, batch),
            "grad_a": frobenius(grad.a, batch),
            "grad_b": frobenius(grad.b, batch),
            "update": frobenius(update, batch),
            "relative": frobenius(update, batch) / frobenius(node.w, axes),
        }
        if path in DORA:
            want |= {"magnitude": frobenius(node.magnitude, batch)}
            want |= {"grad_magnitude": frobenius(grad.magnitude, batch)}
        assert set(got[path]) == set(want)
        for name, value in want.items():
            assert got[path][name].shape == value.shape == ((3,) if batch else ())
            assert got[path][name].dtype == dtype
            np.testing.assert_allclose(got[path][name], value, rtol=rtol, err_msg=f"{path} {name}")
    for path, of in (("bias", lambda w: w), ("embedding", lambda w: w[[2, 7]])):
        node = params[path]
        change = frobenius(np.asarray(node.value, np.float64) - of(np.asarray(node.w)))
        want = {
            "value": frobenius(node.value),
            "grad_value": frobenius(grads[path].value),
            "update": change,
            "relative": change / frobenius(of(np.asarray(node.w))),
        }
        assert set(got[path]) == set(want)
        for name, value in want.items():
            np.testing.assert_allclose(got[path][name], value, rtol=rtol)


def test_no_update_is_formed():
    """Squares of W are as large as W, and no product of two arrays is."""
    params = joined()
    shapes = {squeezed(SHAPES[name]) for name in LAYOUTS}
    products = [
        tuple(sorted(eqn.outvars[0].aval.shape))
        for eqn in equations(jax.make_jaxpr(lora_jax.norms)(params).jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert products and not shapes & set(products)
    plain = {name: params[name] for name in LAYOUTS if name not in DORA}
    made = weight_sized(jax.make_jaxpr(lora_jax.norms)(plain).jaxpr, shapes)
    squares = lambda tree: [jnp.sum(x * x) for x in jax.tree.leaves(tree)]
    base, _ = lora_jax.split(plain)
    assert made <= weight_sized(jax.make_jaxpr(squares)(base).jaxpr, shapes)


def test_an_overlay_has_no_base_to_be_relative_to():
    got = jax.eval_shape(lora_jax.norms, lora_jax.split(joined())[1])
    assert set(got["dense"]) == {"a", "b", "update"} and set(got["bias"]) == {"value"}
    assert set(got["dora"]) == {"a", "b", "magnitude"}


def test_nothing_is_nan_at_the_start_or_where_the_base_is_zero():
    zero = lambda *shape: jnp.asarray(np.zeros(shape, np.float32))
    node = LoraWeight(zero(4, 3), zero(4, 2) + 1, zero(2, 3), zero() + 1, layout=Layout("io"))
    with jax.debug_nans(True):
        got = jax.jit(lora_jax.norms)({"w": node})["w"]
    assert float(got["update"]) == float(got["relative"]) == 0 and float(got["a"]) > 0
    disabled = jax.jit(lora_jax.norms)(lora_jax.disable(joined()))
    assert all(np.max(found["update"]) == 0 for found in disabled.values())


def test_a_product_that_cancels():
    """A·B = 0 with A and B far from it: the sum of squares must not go below zero."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200, 1)) * np.array([[1.0, -1.0]])
    b = np.ones((2, 1)) * rng.normal(size=(1, 100))
    node = LoraWeight(None, *map(jnp.float32, (a, b, 1)), layout=Layout("io"))
    got = jax.jit(lora_jax.norms)({"w": node})["w"]
    assert 0 <= float(got["update"]) < 3e-4 * float(got["a"] * got["b"])


def test_refusals():
    with pytest.raises(StructureError, match="the tree contains no adapters"):
        lora_jax.norms({"w": jnp.ones(3)})
    params = joined()
    with pytest.raises(StructureError, match="no gradients for dense"):
        lora_jax.norms(params, {**params, "dense": params["dense"].w})
