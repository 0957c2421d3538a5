"""Layers and biases that a configuration selects besides its targets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraConfig, TargetError, TrainedLeaf
from lora_jax.core.paths import layer_number
from lora_jax.core.tree import adapted_nodes
from tests.programs import normal

KEY = jax.random.key(0)


def dense(n_in, n_out):
    return {"kernel": jnp.ones((n_in, n_out)), "bias": jnp.zeros(n_out)}


PARAMS = {
    "embed": {"embedding": jnp.ones((11, 5))},
    **{f"block_{i}": {"Dense_0": dense(5, 7), "Dense_1": dense(7, 5)} for i in range(4)},
    "head": dense(5, 11),
}


def init(**fields):
    return lora_jax.init(KEY, PARAMS, LoraConfig(**{"rank": 2, **fields}))


def chosen(**fields):
    return set(adapted_nodes(init(**fields)))


def kernels(*blocks, dense=(0, 1)):
    return {f"block_{i}/Dense_{j}/kernel" for i in blocks for j in dense}


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "pattern", "place"),
    [
        ("block_3/attn/query/kernel", None, ("block_", 3)),
        ("layers/12/kernel", None, ("layers/", 12)),
        ("model.layers.3.q_proj.weight", None, ("model.layers.", 3)),
        ("transformer/h3/w", None, ("transformer/h", 3)),
        ("conv2d_1/kernel", None, ("conv2d_", 1)),
        ("conv2d/kernel", None, None),
        ("h/0/experts/5/w", None, ("h/", 0)),
        ("h/0/experts/5/w", "experts", ("h/0/experts/", 5)),
        ("block_3/Dense_1/kernel", "Dense", ("block_3/Dense_", 1)),
        ("block_3/Dense_1/kernel", "head", None),
        ("transformer/h3_attn/linear/w", None, None),
        ("transformer/h3_attn/linear/w", r"h(\d+)_", ("transformer/h", 3)),
        ("transformer/ln/w", r"h(\d+)_", None),
        ("hx_attn/w", r"h(.+)_", None),
    ],
)
def test_the_number_of_a_layer(path, pattern, place):
    assert layer_number(path, pattern) == place


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        ([1], {1}),
        ([0, -1], {0, 3}),
        (range(2), {0, 1}),
        (slice(-2, None), {2, 3}),
        (slice(None, None, 2), {0, 2}),
        (slice(1, 99), {1, 2, 3}),
    ],
)
def test_layers(layers, blocks):
    """Of every block in `layers`, and the head, which has no number, of none."""
    assert chosen(layers=layers) == kernels(*blocks)


def test_layers_pattern_says_which_number():
    assert chosen(layers=[1], layers_pattern="Dense") == kernels(0, 1, 2, 3, dense=[1])
    assert chosen(layers=[-1], layers_pattern=r"block_(\d+)/D") == kernels(3)


def test_every_stack_counts_by_itself():
    params = {
        "encoder": {f"layers_{i}": {"kernel": jnp.ones((4, 4))} for i in range(3)},
        "decoder": {f"layers_{i}": {"kernel": jnp.ones((4, 4))} for i in range(2)},
    }
    nodes = adapted_nodes(lora_jax.init(KEY, params, LoraConfig(rank=1, layers=[-1])))
    assert set(nodes) == {"encoder/layers_2/kernel", "decoder/layers_1/kernel"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [0, 4]}, "layers: 4 selects no target; the targets are in layers 0, 1, 2, 3"),
        ({"layers": [-5]}, "-5,.* selects no target"),
        ({"layers": slice(4, None)}, "selects no target"),
        ({"layers": [0], "layers_pattern": "blok"}, "layers_pattern="),
        ({"layers": [0], "targets": ["head"]}, "no target has a layer number"),
        ({"layers": [0], "targets": ["head", "Dense_0"]}, "targets: 'head' has no layer number"),
        ({"layers": [3], "targets": ["block_1/Dense_0", "block_2"]}, "in layers 1, 2"),
    ],
)
def test_layers_that_select_nothing(fields, message):
    with pytest.raises(TargetError, match=message):
        init(**fields)


# Two kernels of four layers, which a scan walks along the first or the second axis.
STACK = {"Dense_0": (5, 7), "Dense_1": (7, 5)}


def scanned(axis):
    def fn(params, x):
        def layer(x, kernels):
            return jnp.tanh(x @ kernels["Dense_0"]["kernel"]) @ kernels["Dense_1"]["kernel"], None

        layers = jax.tree.map(lambda w: jnp.moveaxis(w, axis, 0), params["layers"])
        return jax.lax.scan(layer, x, layers)[0] @ params["head"]["kernel"]

    kernels = {
        name: {"kernel": jnp.moveaxis(normal(i, (4, *shape), jnp.float32), 0, axis)}
        for i, (name, shape) in enumerate(STACK.items())
    }
    return fn, {"layers": kernels, "head": {"kernel": normal(3, (5, 3), jnp.float32)}}


X = normal(4, (2, 5), jnp.float32)


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_of_a_scan_share_a_leaf(axis, quick_compile):
    """A, B and the scale are zero in those left out, which therefore never move."""
    fn, params = scanned(axis)
    with pytest.raises(TargetError, match=r"layers/Dense_0/kernel has a number .* batch axes"):
        lora_jax.init(KEY, params, LoraConfig(layers=[1, -1]), fn, X)
    config = LoraConfig(rank=2, layers=[1, -1], layers_pattern="layers")
    start = lora_jax.init(KEY, params, config, fn, X)
    node = start["layers"]["Dense_0"]["kernel"]
    assert node.layout.axes == ("bio" if axis == 0 else "ibo")
    np.testing.assert_array_equal(node.scale, [0, 1, 0, 1])
    assert isinstance(start["head"]["kernel"], jax.Array)

    @jax.jit
    def step(params):
        grads = jax.grad(lambda p: jnp.sin(lora_jax.lora(fn)(p, X)).sum())(params)
        return jax.tree.map(lambda x, g: x - 0.1 * g, params, grads)

    trained = step(step(lora_jax.set_scale(start, 0.5)))
    for name in STACK:
        got = lora_jax.merge(trained)["layers"][name]["kernel"]
        moved = np.moveaxis(np.asarray(got != params["layers"][name]["kernel"]), axis, 0)
        np.testing.assert_array_equal(moved.any((1, 2)), [False, True, False, True])


def test_layers_of_a_scan_on_shapes_alone():
    fn, params = scanned(0)
    config = LoraConfig(rank=2, layers=slice(1), layers_pattern="layers")
    shapes = jax.eval_shape(lambda: params)
    abstract = lora_jax.init(KEY, shapes, config, fn, X)
    real = lora_jax.init(KEY, params, config, fn, X)
    want = jax.tree.map(lambda x: (x.shape, x.dtype), real)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == want
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))


def test_a_pattern_tells_layers_from_experts():
    params = {"layers": jnp.ones((3, 4, 5)), "experts": jnp.ones((2, 4, 5))}
    config = LoraConfig(
        rank=2, layers=[0], layers_pattern="layers", overrides={".*": {"layout": "bio"}}
    )
    params = {name: {"w": x} for name, x in params.items()}
    assert set(adapted_nodes(lora_jax.init(KEY, params, config))) == {"layers/w"}


# --- biases ---------------------------------------------------------------------------------------


def whole(params):
    return {p: n for p, n in adapted_nodes(params).items() if isinstance(n, TrainedLeaf)}


def test_biases():
    """PEFT's none, lora_only and all."""
    assert not whole(init(targets=["Dense_0"]))
    beside = init(targets=["Dense_0"], layers=[1, 2], bias="adapted")
    assert set(whole(beside)) == {"block_1/Dense_0/bias", "block_2/Dense_0/bias"}
    every = init(targets=["Dense_0"], bias="all")
    want = {f"block_{i}/Dense_{j}/bias" for i in range(4) for j in range(2)} | {"head/bias"}
    assert set(whole(every)) == want
    alone = init(targets=(), bias="all", train=["head"])
    assert set(adapted_nodes(alone)) == want | {"head/kernel"}


def test_biases_of_other_libraries():
    """Haiku's "b", an attention's bias of two axes; and what has the name alone is none."""
    params = {
        "linear": {"w": jnp.ones((4, 6)), "b": jnp.zeros(6)},
        "query": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.zeros((2, 3))},
        "lora": {"w": jnp.ones((6, 3)), "b": jnp.ones((3, 3)), "bias": jnp.zeros((2, 5))},
        "norm": {"bias": jnp.zeros(6), "b": jnp.int32(3)},
    }

    def fn(params, x):
        x = x @ params["linear"]["w"] + params["linear"]["b"][None] + params["norm"]["bias"][None]
        q = jnp.einsum("te,ehd->thd", x, params["query"]["kernel"]) + params["query"]["bias"][None]
        return q, x @ params["lora"]["w"] @ params["lora"]["b"]

    def biases(**fields):
        return set(whole(lora_jax.init(KEY, params, LoraConfig(rank=1, **fields), fn, X[:, :4])))

    assert biases(bias="adapted") == {"linear/b", "query/bias"}
    assert biases(bias="all") == {"linear/b", "query/bias", "norm/bias", "lora/bias"}
    assert biases(bias="all", targets=["query"]) == biases(bias="all")


def test_no_bias_to_train():
    params = {"w": jnp.ones((4, 3)), "c": {"bias": jnp.zeros(3)}}
    with pytest.raises(TargetError, match="no leaf named bias or b beside an adapted kernel"):
        lora_jax.init(KEY, params, LoraConfig(rank=1, bias="adapted"))
    del params["c"]
    with pytest.raises(TargetError, match='bias="all": no leaf named bias or b is'):
        lora_jax.init(KEY, params, LoraConfig(rank=1, bias="all"))


def test_biases_of_stacked_layers_train_in_the_layers_chosen():
    params = {"layers": {"kernel": jnp.ones((3, 4, 5)), "bias": jnp.zeros((3, 5))}}
    fields = {"overrides": {"kernel": {"layout": "bio"}}, "layers": [1], "bias": "adapted"}
    start = lora_jax.init(KEY, params, LoraConfig(rank=1, **fields))
    node = start["layers"]["bias"]
    np.testing.assert_array_equal(node.scale, [[0], [1], [0]])
    moved = {"layers": {**start["layers"], "bias": dataclasses.replace(node, value=node.value + 1)}}
    want = np.array([0, 1, 0])[:, None] * np.ones((3, 5))
    np.testing.assert_array_equal(lora_jax.merge(moved)["layers"]["bias"], want)
    got = lora_jax.lora(lambda p: p["layers"]["bias"])(moved)
    np.testing.assert_array_equal(got, want)
    grads = jax.grad(lambda p: lora_jax.lora(lambda q: q["layers"]["bias"].sum())(p))(moved)
    np.testing.assert_array_equal(grads["layers"]["bias"].value, want)
    np.testing.assert_array_equal(lora_jax.merge(lora_jax.disable(moved))["layers"]["bias"], 0)


# --- what takes a configuration besides init ------------------------------------------------------


def test_extract_heeds_layers_biases_and_rows(quick_compile):
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.normal(size=shape).astype(np.float32)
    base = {"layers": {"kernel": array(3, 4, 5), "bias": array(3, 5)}, "embedding": array(6, 4)}
    tuned = jax.tree.map(lambda x: x + np.sin(7 * x) + 1, base)
    config = LoraConfig(
        rank=4,
        targets=["kernel"],
        overrides={"kernel": {"layout": "bio"}},
        layers=[1],
        bias="adapted",
        rows={"embedding": [5, 0]},
    )

    @jax.jit
    def run(base, tuned):
        overlay, residuals = lora_jax.extract(base, tuned, config, exact=True)
        return lora_jax.merge(lora_jax.join(base, overlay)), residuals

    got, residuals = jax.tree.map(np.asarray, run(base, tuned))
    change = lambda x: np.asarray(x, np.float64)
    for name, missing in (("kernel", [0, 2]), ("bias", [0, 2])):
        before, after = (change(tree["layers"][name]) for tree in (base, tuned))
        np.testing.assert_array_equal(got["layers"][name][::2], before[::2])
        np.testing.assert_allclose(got["layers"][name][1], after[1], atol=1e-5)
        missed = np.linalg.norm((after - before)[missing]) / np.linalg.norm(after - before)
        np.testing.assert_allclose(residuals[f"layers/{name}"], missed, rtol=1e-5)
    before, after = change(base["embedding"]), change(tuned["embedding"])
    np.testing.assert_array_equal(got["embedding"][1:5], before[1:5])
    np.testing.assert_array_equal(got["embedding"][[0, 5]], after[[0, 5]])
    missed = np.linalg.norm((after - before)[1:5]) / np.linalg.norm(after - before)
    np.testing.assert_allclose(residuals["embedding"], missed, rtol=1e-5)


@pytest.mark.parametrize("initializer", ["pissa", "loftq"])
def test_an_initializer_that_changes_the_base_leaves_the_other_layers_alone(
    initializer, quick_compile
):
    params = {"layers": normal(1, (3, 8, 6), jnp.float32)}
    fields = {"overrides": {"layers": {"layout": "bio"}}, "layers": [-1], "init": initializer}
    config = LoraConfig(rank=2, dora=True, **fields)
    node = jax.jit(lambda p: lora_jax.init(KEY, p, config))(params)["layers"]
    np.testing.assert_array_equal(node.w[:2], params["layers"][:2])
    assert float(jnp.abs(node.a[:2]).max()) == float(jnp.abs(node.b[:2]).max()) == 0
    assert float(jnp.abs(node.b[2]).max()) > 0
    merged = lora_jax.merge({"layers": node})["layers"]
    np.testing.assert_array_equal(merged[:2], params["layers"][:2])


def test_eva_heeds_layers_and_rows(quick_compile):
    """A table of which rows train is a table to it, and a layer left out stays out."""
    stack, params = scanned(0)
    params |= {"embedding": normal(5, (11, 5), jnp.float32)}
    fn = lambda params, ids: stack(params, params["embedding"][ids])
    ids = jnp.arange(11)
    fields = {"layers": [1, 2], "layers_pattern": "layers", "rows": {"embedding": [3]}}
    start = lora_jax.init(KEY, params, LoraConfig(rank=2, **fields), fn, ids)
    got = lora_jax.eva(fn, start, [(ids,)], rho=1.0)
    for name in STACK:
        node = got["layers"][name]["kernel"]
        lives = np.asarray(jnp.abs(node.a).max((1, 2)) > 0)
        np.testing.assert_array_equal(lives, [False, True, True, False])
        np.testing.assert_array_equal(node.scale, start["layers"][name]["kernel"].scale)
        gram = np.einsum("lir,lis->lrs", node.a[1:3], node.a[1:3])
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(2), (2, 2, 2)), atol=1e-4)
    np.testing.assert_array_equal(got["embedding"].value, params["embedding"][3:4])
