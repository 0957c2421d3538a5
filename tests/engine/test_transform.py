"""`lora(fn)`: what passes through it, where gradients stop, dtypes, dropout and compilations."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraConfig
from tests.programs import is_node, merged, normal, randomize
from tests.programs.jaxprs import weight_sized

KEY = jax.random.key(0)
X = normal(0, (6, 7), jnp.float32)
W = normal(1, (7, 5), jnp.float32)


def model(params, x):
    return jnp.tanh(x @ params["kernel"]) + params["bias"]


def adapted_params(**fields):
    config = LoraConfig(**{"rank": 2, "alpha": 3, **fields})
    params = {"kernel": W, "bias": normal(2, (5,), jnp.float32)[None]}
    return randomize(lora_jax.init(KEY, params, config, model, X))


# --- passing through ------------------------------------------------------------------------------


def test_without_adapters_it_is_the_function_itself():
    called = []

    def fn(x, *, flag):
        called.append(flag)
        return x

    assert lora_jax.lora(fn)("text", flag=[1]) == "text" and called == [[1]]
    assert lora_jax.lora(fn).__name__ == "fn"


def test_non_array_arguments_and_outputs_pass_through():
    params = adapted_params()
    marker = object()

    def fn(params, x, mode, *, train=False, names=(), array=None):
        assert train is True and mode == "fast" and names == ("a", "b")
        assert isinstance(array, np.ndarray) and array.sum() == 3  # concrete: Python can read it
        arrays = [jnp.ones((), jnp.bfloat16), jnp.array(False), jnp.asarray(0.5)]
        named = {"y": model(params, x), "mode": mode, "n": 3, "none": None, "marker": marker}
        return {**named, "arrays": arrays}

    out = lora_jax.lora(fn)(params, X, "fast", train=True, names=("a", "b"), array=np.array([1, 2]))
    assert (out["mode"], out["n"], out["none"], out["marker"]) == ("fast", 3, None, marker)
    np.testing.assert_allclose(out["y"], model(merged(params), X), atol=1e-5)
    assert all(isinstance(x, jax.Array) for x in out["arrays"])  # though they do not depend on x
    assert [str(jax.typeof(x).dtype) for x in out["arrays"]] == ["bfloat16", "bool", "float32"]
    assert [x.weak_type for x in out["arrays"]] == [False, False, True]


def test_adapters_in_any_argument():
    params = adapted_params()

    def fn(x, *, scope):
        return model(scope["deep"][0], x)

    out = lora_jax.lora(fn)(X, scope={"deep": [params]})
    np.testing.assert_allclose(out, model(merged(params), X), atol=1e-5)


def test_mutable_collections_and_rngs():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(5)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

    net = Net()
    variables = net.init(KEY, X, train=False)
    stats = variables["batch_stats"]
    args = (X,)
    kwargs = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(5)}}

    def apply(params, x, **kwargs):
        return net.apply({"params": params, "batch_stats": stats}, x, **kwargs)

    params = lora_jax.init(KEY, variables["params"], LoraConfig(rank=2), apply, *args, **kwargs)
    params = randomize(params)
    got = lora_jax.lora(apply)(params, *args, **kwargs)
    want = apply(merged(params), *args, **kwargs)
    chex.assert_trees_all_close(got, want, atol=1e-5)
    assert not np.array_equal(got[1]["batch_stats"]["BatchNorm_0"]["mean"], np.zeros(5))


def test_a_returned_weight_is_the_merged_one():
    params = adapted_params()
    with pytest.warns(lora_jax.DenseWarning, match="kernel: `return`"):
        out = lora_jax.lora(lambda p: p["kernel"])(params)
    np.testing.assert_allclose(out, merged(params)["kernel"], atol=1e-6)


def test_nested():
    params = adapted_params()
    inner = lora_jax.lora(model)
    got = lora_jax.lora(lambda p, x: inner(p, x) * 2)(params, X)
    np.testing.assert_allclose(got, 2 * model(merged(params), X), atol=1e-5)


def test_export_and_back():
    params = adapted_params()
    exported = jax.export.export(jax.jit(lora_jax.lora(model)))(params, X)
    restored = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(restored.call(params, X), model(merged(params), X), atol=1e-5)


def test_two_weights_that_meet_each_other():
    """One of two adapted operands must be dense; the product is still that of the merged two."""
    params = {"u": normal(3, (4, 7), jnp.float32), "kernel": W}

    def fn(params, x):
        return x @ (params["u"] @ params["kernel"])

    x = normal(5, (3, 4), jnp.float32)
    config = LoraConfig(rank=2, targets=["u", "kernel"], overrides={"u": {"layout": "io"}})
    params = randomize(lora_jax.init(KEY, params, config, fn, x))
    with pytest.warns(lora_jax.DenseWarning, match="both sides are adapted"):
        got = lora_jax.lora(fn)(params, x)
    np.testing.assert_allclose(got, fn(merged(params), x), rtol=1e-4, atol=1e-4)


def test_data_parallel_shard_map_stays_lazy():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    apply = lora_jax.lora(model, on_dense="error")
    mapped = jax.shard_map(apply, mesh=mesh, in_specs=(spec(), spec("d")), out_specs=spec("d"))
    mapped = jax.jit(mapped)  # otherwise every operation in it is compiled by itself
    params = adapted_params()
    np.testing.assert_allclose(mapped(params, X), model(merged(params), X), atol=1e-5)
    grads = jax.grad(lambda p: (mapped(p, X) ** 2).sum())(params)
    want = jax.grad(lambda p: (apply(p, X) ** 2).sum())(params)
    np.testing.assert_allclose(grads["kernel"].a, want["kernel"].a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_inner_jit_with_shardings(kind):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))

    def fn(params, x):
        inner = jax.jit(lambda w, x: jnp.tanh(x @ w), out_shardings=sharding)
        return inner(params["kernel"], x)

    params = adapted_params()
    with jax.set_mesh(mesh):
        got = lora_jax.lora(fn, on_dense="error")(params, X)
    assert got.sharding.spec == sharding.spec
    np.testing.assert_allclose(got, jnp.tanh(X @ merged(params)["kernel"]), atol=1e-5)


def test_branches_by_platform_are_not_mixed():
    def fn(params, x):
        broken = lambda w, x: jax.pure_callback(lambda *_: 1 / 0, x, x) @ w
        plain = lambda w, x: x @ w
        return jax.lax.platform_dependent(params["kernel"], x, tpu=broken, default=plain)

    params = adapted_params()
    config = LoraConfig(rank=2)
    start = lora_jax.init(KEY, {"kernel": W}, config, fn, X)
    assert start["kernel"].layout.axes == "io"
    got = lora_jax.lora(fn, on_dense="allow")(params, X)
    np.testing.assert_allclose(got, X @ merged(params)["kernel"], atol=1e-5)


def test_on_dense_is_checked():
    with pytest.raises(lora_jax.ConfigError, match="pass a function first, got dict"):
        lora_jax.lora({})
    with pytest.raises(lora_jax.ConfigError, match="on_dense"):
        lora_jax.lora(model, on_dense="ignore")


def test_adapters_without_their_base():
    _, adapters = lora_jax.split(adapted_params())
    with pytest.raises(lora_jax.StructureError, match=r"kernel.*join"):
        lora_jax.lora(model)(adapters, X)


def test_no_tracer_leaks(small_heap):
    params = adapted_params()
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda p: lora_jax.lora(model)(p, X).sum()))(params)


def test_strict_dtype_promotion(strict):
    lora_jax.lora(model)(adapted_params(), X)
    lora_jax.merge(adapted_params())


# --- gradients ------------------------------------------------------------------------------------


def test_gradients_stop_at_frozen_leaves_and_reach_other_inputs():
    params = adapted_params(train=["bias"])
    loss = lambda p, x: (lora_jax.lora(model)(p, x) ** 2).sum()
    grads, dx = jax.grad(loss, (0, 1))(params, X)
    node, bias = grads["kernel"], grads["bias"]
    for frozen in (node.w, node.scale, bias.w, bias.scale):
        np.testing.assert_array_equal(frozen, 0)
    for trained in (node.a, node.b, bias.value, dx):
        assert float(jnp.abs(trained).max()) > 1e-2
    frozen_bias = jax.grad(loss)(adapted_params(), X)["bias"]
    np.testing.assert_array_equal(frozen_bias, 0)


def test_gradient_of_a_trained_leaf_is_the_models():
    params = adapted_params(train=["bias"])
    grads = jax.grad(lambda p: (lora_jax.lora(model)(p, X) ** 2).sum())(params)
    want = jax.grad(lambda p: (model(p, X) ** 2).sum())(merged(params))
    np.testing.assert_allclose(grads["bias"].value, want["bias"], rtol=1e-5)


def test_forward_mode_over_reverse_mode():
    params = adapted_params()
    base, adapters = lora_jax.split(params)

    def hvp(fn):
        loss = lambda a: (fn(a) ** 2).sum()
        tangent = jax.tree.map(jnp.cos, adapters)
        return jax.jvp(jax.grad(loss), (adapters,), (tangent,))[1]["kernel"].a

    ours = hvp(lambda a: lora_jax.lora(model)(lora_jax.join(base, a), X))
    freeze = lambda n: dataclasses.replace(n, scale=jax.lax.stop_gradient(n.scale))
    stop = lambda p: jax.tree.map(lambda n: freeze(n) if is_node(n) else n, p, is_leaf=is_node)
    want = hvp(lambda a: model(merged(stop(lora_jax.join(base, a))), X))
    np.testing.assert_allclose(ours, want, rtol=1e-3, atol=1e-3)


# --- dtypes ---------------------------------------------------------------------------------------


def dots(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for value in eqn.params.values():
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from dots(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_bfloat16_compute(stored):
    """bfloat16 products that add in float32, over float32 and over bfloat16 weights."""
    dense = nn.Dense(48, dtype=jnp.bfloat16, param_dtype=stored)
    x = normal(0, (16, 64), jnp.float32)
    base = dense.init(KEY, x)
    params = randomize(lora_jax.init(KEY, base, LoraConfig(rank=4), dense.apply, x))
    adapted = lora_jax.lora(dense.apply)
    got = adapted(params, x)
    assert got.dtype == jnp.bfloat16

    exact = jax.tree.map(lambda v: v.astype(jnp.float32), params)
    want = nn.Dense(48).apply(merged(exact), x)
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    merged_error = float(jnp.abs(dense.apply(merged(params), x) - want).max() / jnp.abs(want).max())
    assert error <= 1.5 * merged_error  # no worse than the merged model in the same arithmetic

    jaxpr, plain = jax.make_jaxpr(adapted)(params, x), jax.make_jaxpr(dense.apply)(base, x)
    assert weight_sized(jaxpr.jaxpr, {(48, 64)}) <= weight_sized(plain.jaxpr, {(48, 64)})
    branch = list(dots(jaxpr.jaxpr))
    assert len(branch) == 3
    for eqn in branch:  # the factors are cast, or a float32 product would run in slow arithmetic
        assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
    for eqn in branch[1:]:
        assert eqn.outvars[0].aval.dtype == jnp.float32

    grads = jax.grad(lambda p: adapted(p, x).astype(jnp.float32).sum())(params)
    assert grads["params"]["kernel"].a.dtype == jnp.float32
    assert grads["params"]["kernel"].b.dtype == jnp.float32


# --- branch dropout -------------------------------------------------------------------------------


@pytest.mark.usefixtures("optimized")
def test_dropout_needs_a_key_and_leaves_the_base_product_whole():
    params = adapted_params(dropout=0.5)
    apply = jax.jit(lora_jax.lora(lambda p, x: x @ p["kernel"]))
    plain = apply(params, X)
    np.testing.assert_allclose(plain, X @ merged(params)["kernel"], atol=1e-5)
    dropped = apply(lora_jax.with_dropout(params, jax.random.key(1)), X)
    assert not np.allclose(dropped, plain, atol=1e-3)
    again = apply(lora_jax.with_dropout(params, jax.random.key(1)), X)
    np.testing.assert_array_equal(dropped, again)
    off = lora_jax.with_dropout(lora_jax.with_dropout(params, jax.random.key(1)), None)
    np.testing.assert_array_equal(apply(off, X), plain)
    disabled = lora_jax.disable(lora_jax.with_dropout(params, jax.random.key(1)))
    np.testing.assert_allclose(apply(disabled, X), X @ W, atol=1e-5)


def test_dropout_keeps_the_mean():
    params = adapted_params(dropout=0.3)
    apply = lora_jax.lora(lambda p, x: x @ p["kernel"])
    keys = jax.random.split(jax.random.key(2), 4000)
    outs = jax.jit(jax.vmap(lambda k: apply(lora_jax.with_dropout(params, k), X)))(keys)
    want = X @ merged(params)["kernel"]
    spread = outs.std(0) / np.sqrt(len(keys))
    assert float(jnp.abs((outs.mean(0) - want) / spread).max()) < 5


def test_dropout_of_stacked_layers_differs_by_layer():
    w = {"w": jnp.stack([jnp.eye(7)] * 2)}

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x, x @ w), x, params["w"])[1]

    params = randomize(lora_jax.init(KEY, w, LoraConfig(rank=2, dropout=0.5), fn, X))
    same = dataclasses.replace(
        params["w"], a=params["w"].a[:1].repeat(2, 0), b=params["w"].b[:1].repeat(2, 0)
    )
    out = lora_jax.lora(fn)(lora_jax.with_dropout({"w": same}, jax.random.key(3)), X)
    assert not np.allclose(out[0], out[1], atol=1e-3)


# --- compilations and FLOPs -----------------------------------------------------------------------


@pytest.mark.usefixtures("optimized")
def test_one_compilation_for_swapping_scaling_and_disabling():
    """A counter inside the traced function: swapped, rescaled and disabled adapters reuse it."""
    traces = []

    @jax.jit
    def apply(params, x):
        traces.append(1)
        return lora_jax.lora(model)(params, x)

    base, first = lora_jax.split(adapted_params())
    second = jax.tree.map(lambda x: x * 1.5, first)
    outs = [
        apply(lora_jax.join(base, first), X),
        apply(lora_jax.join(base, second), X),
        apply(lora_jax.set_scale(lora_jax.join(base, first), 0.25), X),
        apply(lora_jax.disable(lora_jax.join(base, first)), X),
    ]
    assert len(traces) == 1 and apply._cache_size() == 1
    np.testing.assert_array_equal(outs[-1], jax.jit(model)(base, X))
    assert len({float(out.sum()) for out in outs}) == 4


SIZES = [(512, 768), (768, 512), (512, 768)]
TOKENS, RANK = 256, 8


def stack_step_flops(form):
    """XLA's FLOPs of one training step of a plain stack of Dense layers."""
    params = {f"layer_{i}": {"kernel": jnp.ones(size)} for i, size in enumerate(SIZES)}

    def loss(params, x):
        for layer in params.values():
            x = x @ layer["kernel"]
        return (x**2).sum()

    x = jnp.ones((TOKENS, SIZES[0][0]))
    joined = lora_jax.init(KEY, params, LoraConfig(rank=RANK), loss, x)
    base, adapters = lora_jax.split(joined)
    apply = lora_jax.lora(loss)
    if form == "joined":
        lowered = jax.jit(jax.grad(apply)).lower(joined, x)
    else:
        grad = jax.grad(lambda a, base, x: apply(lora_jax.join(base, a), x))
        lowered = jax.jit(grad).lower(adapters, base, x)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.usefixtures("optimized")
def test_training_step_is_at_the_flop_floor():
    """4TKN + 6Tr(K+N) per layer, without the first layer's input gradient, which nothing needs."""
    k, n = SIZES[0]
    floor = sum(4 * TOKENS * k * n + 6 * TOKENS * RANK * (k + n) for k, n in SIZES)
    floor -= 2 * TOKENS * k * n + 2 * TOKENS * RANK * k
    joined, split = stack_step_flops("joined"), stack_step_flops("split")
    assert joined == split
    assert joined <= 1.005 * floor


def test_entries_picked_along_two_vmapped_axes_that_a_factor_holds_the_other_way_round():
    """Found by the fuzzer: JAX wants the batch axes of a gather in the operand's order."""
    shapes = (2, 3, 7, 5), (3, 5, 2), (3, 2, 2, 7)
    w, a, b = (normal(i, shape, jnp.float32) for i, shape in enumerate(shapes))
    layout = lora_jax.Layout("oboi")
    params = {"w": lora_jax.LoraWeight(w, a, b, jnp.full((3,), 1.5), layout=layout)}
    ids = jnp.array([[0, 6, 3], [2, 2, 5]])

    def model(params):
        return jax.vmap(jax.vmap(lambda rows, i: rows[i]))(params["w"], ids)

    got, want = lora_jax.lora(model)(params), model(merged(params))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
