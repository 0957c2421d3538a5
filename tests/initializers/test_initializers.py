"""Initializers: each one on each kind of weight, against numpy's own decompositions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax
from lora_jax import ConfigError, Layout, LoraConfig, initializers
from lora_jax.adapters.plan import make_plan
from lora_jax.core.config import INITS
from lora_jax.core.linalg import randomized_svd, truncated_svd
from tests.devices import ON_ACCELERATOR
from tests.programs import CASES
from tests.programs.weights_of_each_kind import (
    INPUTS,
    KEY,
    LINEAR,
    PARAMS,
    QUANTIZERS,
    RANK,
    ROWS,
    as_matrices,
    config,
    init,
    initialized,
    normal,
    original,
    program,
    tail,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
LEAVE_THE_BASE = ("kaiming", "gaussian", "orthogonal")
EXACT = tuple(name for name in INITS if name != "loftq")  # the function is unchanged

over_rows = pytest.mark.parametrize("row", ROWS, ids=str)
over_initializers = pytest.mark.parametrize("name", INITS)


def init_linear(name, **fields):
    return lora_jax.init(KEY, {"w": LINEAR.w}, config(name, **fields))["w"]


def half_a_digit(dtype):
    """The relative error of rounding to `dtype`."""
    return float(jnp.finfo(dtype).eps) / 2


# --- every initializer on every weight ------------------------------------------------------------


@over_rows
@over_initializers
def test_shapes_dtypes_and_scale(row, name):
    node, layout = initialized(name)[row.name], Layout(row.axes)
    assert node.layout == layout
    assert node.w.shape == row.shape and node.w.dtype == row.dtype
    assert node.a.shape == layout.a_shape(row.shape, RANK) and node.a.dtype == jnp.float32
    assert node.b.shape == layout.b_shape(row.shape, RANK) and node.b.dtype == jnp.float32
    np.testing.assert_array_equal(node.scale, np.full(layout.select("b", row.shape), 1.5))


@over_rows
@pytest.mark.parametrize("name", EXACT)
def test_the_weight_is_unchanged_before_training(row, name):
    w, a, b = as_matrices(row, initialized(name)[row.name])
    # W' is rounded to the base's dtype; adding and taking away differ by float32's rounding.
    rounding = half_a_digit(row.dtype) * np.abs(w) if name not in LEAVE_THE_BASE else 0
    assert (np.abs(w + 1.5 * a @ b - original(row)) <= rounding + 1e-6).all()


@pytest.mark.parametrize("name", EXACT)
def test_the_function_is_unchanged_before_training(name):
    got = lora_jax.lora(program, on_dense="error")(initialized(name), INPUTS)
    want = program(PARAMS, INPUTS)
    for row in ROWS:
        atol = 3e-2 if row.dtype == jnp.bfloat16 and name not in LEAVE_THE_BASE else 1e-5
        np.testing.assert_allclose(
            np.asarray(got[row.name], np.float32),
            np.asarray(want[row.name], np.float32),
            atol=atol,
            err_msg=row.name,
        )


@over_initializers
def test_shapes_alone_give_shapes(name):
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    for shapes in (init(structs, name), jax.eval_shape(lambda p: init(p, name), PARAMS)):
        assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
        described = jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype).name), shapes)
        assert described == jax.tree.map(lambda x: (x.shape, x.dtype.name), initialized(name))


@over_initializers
def test_outside_jit_the_same_and_the_base_is_the_same_array_where_it_is_left_alone(name):
    w = PARAMS["linear"]
    node = lora_jax.init(KEY, {"linear": w}, config(name))["linear"]
    assert (node.w is w) == (name in LEAVE_THE_BASE)
    compare = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(compare, node, initialized(name)["linear"])


@over_initializers
def test_layers_of_a_stack_are_initialized_as_each_alone(name):
    """Random initializers make layers differ; those computed from the weight do not."""
    node = initialized(name)["stacked"]
    if name in LEAVE_THE_BASE:
        assert (np.asarray(node.a[0]) != np.asarray(node.a[1])).any()
        return
    alone = [lora_jax.init(KEY, {"w": w}, config(name))["w"].w for w in PARAMS["stacked"]]
    tolerance = 1e-2 if name == "pissa_fast" else 1e-5  # each layer has its own sketch
    np.testing.assert_allclose(node.w, alone, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["pissa", "olora", "pissa_fast"])
def test_rounding_is_in_the_program(name, dtype):
    """A cast down and up again may be skipped by XLA, and is on a GPU; reduce_precision is not."""
    layout, args = Layout("io"), (jax.random.key(0), jnp.ones((4, 3)))
    initialize = lambda key, w: getattr(initializers, name)(key, w, layout, 2, 1.5, dtype)
    info = jnp.finfo(dtype)
    want = f"exponent_bits={info.nexp} mantissa_bits={info.nmant}"
    text = " ".join(str(jax.make_jaxpr(initialize)(*args)).split())
    assert len(re.findall(rf"reduce_precision\[ ?{want} ?\]", text)) == 2  # A and B


@pytest.mark.parametrize("name", ["pissa", "olora", "loftq"])
def test_factors_in_a_coarse_dtype(name):
    """The base takes up what rounding A and B to bfloat16 loses."""
    node = init_linear(name, dtype=jnp.bfloat16)
    assert node.a.dtype == node.b.dtype == jnp.bfloat16
    w, a, b = as_matrices(LINEAR, node)
    error = np.abs(w + 1.5 * a @ b - original(LINEAR)).max()
    assert error < (0.3 if name == "loftq" else 4e-6 if ON_ACCELERATOR else 1e-6)


# --- what each initializer does -------------------------------------------------------------------


@over_rows
def test_pissa_is_the_truncated_svd(row):
    _, a, b = as_matrices(row, initialized("pissa")[row.name])
    u, s, vt = np.linalg.svd(original(row), full_matrices=False)
    best = (u[..., :RANK] * s[:, None, :RANK]) @ vt[:, :RANK]
    np.testing.assert_allclose(1.5 * a @ b, best, atol=2e-5)
    both = s[:, :RANK, None] / 1.5 * np.eye(RANK)[None]  # A and B hold √(S/scale) each
    np.testing.assert_allclose(np.swapaxes(a, 1, 2) @ a, both, atol=2e-5)
    np.testing.assert_allclose(b @ np.swapaxes(b, 1, 2), both, atol=2e-5)


@over_rows
def test_fast_pissa_is_nearly_the_truncated_svd(row):
    _, a, b = as_matrices(row, initialized("pissa_fast")[row.name])
    w = original(row)
    assert np.linalg.norm(w - 1.5 * a @ b) < 1.01 * tail(w, RANK) + 1e-6


@over_rows
def test_olora_is_the_qr_decomposition(row):
    _, a, b = as_matrices(row, initialized("olora")[row.name])
    eye = np.broadcast_to(np.eye(RANK), (len(b), RANK, RANK))
    np.testing.assert_allclose(b @ np.swapaxes(b, 1, 2), eye, atol=1e-5)
    for w, got_a, got_b in zip(original(row), a, b, strict=True):
        q, r = np.linalg.qr(w.T)
        np.testing.assert_allclose(got_a @ got_b, (q[:, :RANK] @ r[:RANK]).T, atol=1e-5)


@over_rows
def test_orthogonal_has_two_factors_and_no_product(row):
    _, a, b = as_matrices(row, initialized("orthogonal")[row.name])
    np.testing.assert_allclose(a @ b, 0, atol=1e-6)
    for factor in (a, b):  # randn · half an orthogonal matrix / 10
        assert 0.03 < factor.std() < 0.12
    assert np.linalg.matrix_rank(a[0]) == np.linalg.matrix_rank(b[0]) == RANK // 2


@over_rows
@pytest.mark.parametrize("name", QUANTIZERS)
def test_loftq_is_closer_than_rounding(row, name):
    q, a, b = as_matrices(row, initialized(name)[row.name])
    rounded = QUANTIZERS[name]
    for layer, w in enumerate(original(row)):
        plain = np.linalg.norm(w - rounded(w))
        lost = np.linalg.norm(w - q[layer] - 1.5 * a[layer] @ b[layer])
        assert lost < 0.9 * plain
        # Each half of the last step is what it claims: on the grid, and the best of its rank.
        np.testing.assert_allclose(rounded(q[layer]), q[layer], atol=4 * half_a_digit(row.dtype))
        np.testing.assert_allclose(lost, tail((w - q[layer])[None], RANK), rtol=1e-3)


def test_loftq_gets_closer_with_more_steps():
    def error(steps):
        node = init_linear(initializers.loftq(steps=steps))
        return np.linalg.norm(LINEAR.w - lora_jax.merge(node))

    assert error(5) < error(1) < np.linalg.norm(LINEAR.w - QUANTIZERS["loftq"](LINEAR.w))


def test_gaussian_is_normal_with_deviation_one_over_rank():
    w = {"kernel": jnp.zeros((400, 300))}
    node = lora_jax.init(KEY, w, LoraConfig(rank=50, init="gaussian"))["kernel"]
    np.testing.assert_allclose(node.a.std(), 1 / 50, rtol=0.03)
    np.testing.assert_allclose((np.asarray(node.a) ** 4).mean() * 50**4, 3, rtol=0.1)
    np.testing.assert_array_equal(node.b, 0)


@pytest.mark.parametrize("name", ["kaiming", "gaussian"])
def test_a_weight_only_looked_up_has_the_other_factor_zero(name):
    params, ids = {"w": jnp.zeros((30, 200))}, jnp.arange(3)
    fns = {"lookup": lambda p, i: p["w"][i], "tied": lambda p, i: p["w"][i] @ p["w"].T}
    nodes = {
        use: lora_jax.init(KEY, params, config(name, targets=["w"]), fn, ids)["w"]
        for use, fn in fns.items()
    }
    np.testing.assert_array_equal(nodes["lookup"].a, 0)
    b = np.asarray(nodes["lookup"].b)
    np.testing.assert_allclose([b.mean(), b.std()], [0, 1], atol=0.1)
    np.testing.assert_array_equal(nodes["tied"].b, 0)
    assert np.abs(nodes["tied"].a).max() > 0


def test_a_static_layout_decides_which_factor_is_zero():
    """Layouts that initialize differently differ, so a compiled initializer is not reused."""
    params, ids = {"w": jnp.ones((7, 4))}, jnp.arange(3)
    fns = {"tied": lambda p, i: p["w"][i] @ p["w"].T, "lookup": lambda p, i: p["w"][i]}
    compiled = jax.jit(initializers.kaiming, static_argnums=(2, 3, 4, 5))
    zero = {}
    for name, fn in fns.items():
        plan = make_plan("init", params, config("kaiming", targets=["w"]), fn, (ids,), {}, None)
        _, a, b = compiled(KEY, params["w"], plan.layouts["w"], 2, 1.0, jnp.float32)
        zero[name] = [factor for factor, x in (("a", a), ("b", b)) if not x.any()]
    assert zero == {"tied": ["b"], "lookup": ["a"]}


def test_a_tied_weight_keeps_its_function():
    """Its base is one leaf: what the lookup reads and what attends to it change together."""
    params, ids = {"w": LINEAR.w}, jnp.arange(5)
    fn = lambda p, i: jnp.tanh(p["w"][i]) @ p["w"].T
    adapted = lora_jax.init(KEY, params, config("pissa", targets=["w"]), fn, ids)
    np.testing.assert_allclose(lora_jax.lora(fn)(adapted, ids), fn(params, ids), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_program_of_the_table_is_unchanged_before_training(case, name):
    fn, params, args = case.build(jnp.float32)
    fields = LoraConfig(rank=2, alpha=3, targets=list(case.layouts), init=name)
    adapted = lora_jax.init(KEY, params, fields, fn, *args)
    got = jax.jit(lora_jax.lora(fn, on_dense="error"))(adapted, *args)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(fn(params, *args)), strict=True):
        size = max(1.0, float(np.abs(w).max()))
        np.testing.assert_allclose(np.asarray(g) / size, np.asarray(w) / size, atol=1e-5)


# --- in use ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", "olora", "orthogonal"])
def test_both_factors_get_gradients_from_the_first_step(name):
    apply = lora_jax.lora(lambda params, x: x @ params["w"])
    base, adapters = lora_jax.split({"w": initialized(name)["linear"]})
    loss = lambda adapters: (apply(lora_jax.join(base, adapters), LINEAR.x) ** 2).sum()
    grads = jax.grad(loss)(adapters)["w"]
    assert min(float(np.abs(x).max()) for x in (grads.a, grads.b)) > 1e-3


def test_a_changed_base_keeps_its_sharding():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {
        "w": jax.device_put(normal(1, 4, 16, 16), sharding)
    }  # the layers, one after the other
    stack = config("pissa", overrides={"w": {"layout": "bio"}})
    node = lora_jax.init(KEY, params, stack)["w"]
    assert node.w.sharding == sharding
    np.testing.assert_allclose(lora_jax.merge(node), params["w"], atol=1e-5)
    struct = jax.ShapeDtypeStruct((4, 16, 16), jnp.float32, sharding=sharding)
    assert lora_jax.init(KEY, {"w": struct}, stack)["w"].w is struct


def test_a_changed_base_may_still_go_to_any_device():
    node = init_linear("pissa")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((2, 24)), NamedSharding(mesh, PartitionSpec("x")))
    assert jax.jit(jnp.matmul)(x, node.w).shape == (2, 16)


def test_a_custom_initializer():
    def ones(key, w, layout, rank, scale, dtype):
        a = jnp.ones(layout.a_shape(w.shape, rank), dtype)
        b = jnp.ones(layout.b_shape(w.shape, rank), dtype)
        return w - scale * rank, a, b

    mine = config(ones)
    node = init_linear(ones)
    np.testing.assert_array_equal(node.a, 1)
    np.testing.assert_allclose(lora_jax.merge(node), LINEAR.w, atol=1e-5)
    assert "ones" in mine.to_dict()["init"] and hash(mine) == hash(config(ones))


def test_the_names_are_those_of_the_configuration():
    assert tuple(initializers.INITIALIZERS) == INITS


# --- refusals -------------------------------------------------------------------------------------


def refusal(params=None, **fields):
    params = {"w": LINEAR.w, "v": LINEAR.w} if params is None else params
    with pytest.raises(ConfigError) as caught:
        lora_jax.init(KEY, params, config(**{"targets": list(params), **fields}))
    return str(caught.value)


@pytest.mark.parametrize("name", ["pissa", "pissa_fast", "loftq"])
def test_a_scale_that_cannot_be_divided_by(name):
    for alpha in (0, -1):
        message = refusal(name=name, alpha=alpha)
        assert "w: this initializer divides by the scale" in message and "v: this" in message


def test_orthogonal_of_an_odd_rank():
    message = refusal(name="orthogonal", rank=3)
    assert "w: " in message and "even rank, got 3" in message
    shapes = {"w": jax.ShapeDtypeStruct((24, 16), jnp.float32)}
    assert "even rank" in refusal(shapes, name="orthogonal", rank=3)


def test_a_custom_initializer_that_does_not_fit():
    good = initializers.kaiming
    bad = {
        "w' is float32[16, 24], expected float32[24, 16]": lambda w, a, b: (w.T, a, b),
        "w' is bfloat16[24, 16]": lambda w, a, b: (w.astype(jnp.bfloat16), a, b),
        "a is float32[24, 3], expected float32[24, 4]": lambda w, a, b: (w, a[:, 1:], b),
        "b is bfloat16[4, 16]": lambda w, a, b: (w, a, b.astype(jnp.bfloat16)),
    }
    for message, change in bad.items():
        assert message in refusal(name=lambda *args, change=change: change(*good(*args)))


@pytest.mark.parametrize("fields", [{"steps": 0}, {"steps": True}, {"quantizer": 4}])
def test_loftq_of_what_cannot_be(fields):
    with pytest.raises(ConfigError, match=f"loftq: {next(iter(fields))}"):
        initializers.loftq(**fields)


# --- the decompositions themselves ----------------------------------------------------------------


def test_truncating_the_svd_leaves_the_singular_tail():
    """Eckart and Young: the error of rank r is √(σ²_{r+1} + ...)."""
    m = LINEAR.w
    sigma = np.linalg.svd(np.asarray(m), compute_uv=False)
    for rank in (1, 5, 16):
        u, s, vt = truncated_svd(m, rank)
        left = np.linalg.norm(m - (u * s[None]) @ vt)
        np.testing.assert_allclose(left, np.sqrt((sigma[rank:] ** 2).sum()), atol=1e-4)


sketched = jax.jit(randomized_svd, static_argnums=2)


@pytest.mark.parametrize("shape", [(120, 80), (5, 90)])
def test_the_randomised_svd_is_nearly_as_close(shape):
    m = normal(5, shape[0], 60) @ normal(6, 60, shape[1]) / 8 + normal(7, *shape) / 4
    rank = min(16, *shape)
    u, s, vt = map(np.asarray, sketched(KEY, m, rank))
    best = tail(np.asarray(m)[None], rank)
    assert np.linalg.norm(m - (u * s) @ vt) <= 1.02 * best + 1e-3
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-5)
    np.testing.assert_allclose(vt @ vt.T, np.eye(rank), atol=1e-5)
    assert (np.diff(s) <= 1e-4).all()


def test_a_matrix_of_low_rank_comes_back_whole():
    m = normal(5, 40, 3) @ normal(6, 3, 30)
    u, s, vt = map(np.asarray, sketched(KEY, m, 3))
    np.testing.assert_allclose((u * s) @ vt, m, atol=1e-4)
