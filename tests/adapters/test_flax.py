"""Flax's boxes and bytes: the specifications of factors, and what `flax.serialization` writes."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import LoraConfig
from tests.programs import is_node, normal, randomize

KEY = jax.random.key(0)
X = normal(0, (3, 8), jnp.float32)
CONFIG = LoraConfig(rank=2, dora=True, bias="adapted")


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        box = nn.with_partitioning
        kernel, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        dense = nn.DenseGeneral(
            (4, 6),
            kernel_init=box(kernel, ("embed", "heads", None)),
            bias_init=box(zeros, ("heads", None)),
            name="heads",
        )
        out = nn.Dense(8, kernel_init=box(kernel, ("heads", "embed")), name="out")
        return x + out(jnp.tanh(dense(x)).reshape(len(x), -1))


def boxed():
    params = Model().init(KEY, X)
    return randomize(lora_jax.init(KEY, params, CONFIG, Model().apply, X))


def test_specifications_of_factors():
    specs = lora_jax.partition_specs(boxed())["params"]
    heads, out = specs["heads"]["kernel"], specs["out"]["kernel"]
    assert (heads.w, heads.a, heads.b) == (
        P("embed", "heads", None),
        P("embed", None),
        P(None, "heads", None),
    )
    assert heads.magnitude == P("heads", None) and heads.scale == P() and heads.key is None
    assert (out.w, out.a, out.b) == (P("heads", "embed"), P("heads", None), P(None, "embed"))
    bias = specs["heads"]["bias"]
    assert (bias.w, bias.value, bias.scale) == (P("heads", None), P("heads", None), P())
    assert specs["out"]["bias"].value == P()  # it has no box


def test_they_place_every_array():
    mesh = jax.make_mesh((2, 2), ("embed", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    params = boxed()
    specs = lora_jax.partition_specs(params)
    plain = nn.meta.unbox(params)
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    placed = jax.device_put(plain, shardings)
    assert placed["params"]["heads"]["kernel"].a.addressable_shards[0].data.shape == (4, 2)
    got = jax.jit(lora_jax.lora(Model().apply))(placed, X)
    np.testing.assert_allclose(got, Model().apply(lora_jax.merge(plain), X), rtol=1e-4, atol=1e-5)


def test_stacks_and_rows():
    params = {
        "stack": nn.Partitioned(jnp.ones((3, 8, 4)), names=("layers", "in", "out")),
        "embedding": nn.Partitioned(jnp.ones((9, 4)), names=("vocab", "embed")),
    }
    config = LoraConfig(
        rank=2,
        targets=["stack"],
        overrides={"stack": {"layout": "bio"}},
        rows={"embedding": [3]},
    )
    specs = lora_jax.partition_specs(lora_jax.init(KEY, params, config))
    assert specs["stack"].a == P("layers", "in", None) and specs["stack"].scale == P("layers")
    assert specs["stack"].b == P("layers", None, "out")
    assert specs["embedding"].value == P(None, "embed")


@pytest.mark.slow
def test_the_state_of_the_optimizer_has_them_too():
    params = boxed()
    tx = lora_jax.freeze(optax.adam(1e-2), params)
    specs = nn.get_partition_spec(tx.init(params))
    found = specs.inner_states["train"].inner_state[0].mu["params"]["heads"]["kernel"]
    assert found["a"] == P("embed", None) and found["b"] == P(None, "heads", None)
    loss = lambda params: (lora_jax.lora(Model().apply)(params, X) ** 2).mean()
    grads = jax.grad(loss)(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert float(loss(lora_jax.apply_updates(params, updates))) < float(loss(params))


def test_nnx_variables_with_shardings():
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    call = lambda model, x: model(x)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))
        model = nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0))
        q = lora_jax.init(KEY, model, LoraConfig(rank=2), call, X)
        specs = lora_jax.partition_specs(nnx.state(q, nnx.Param))
        assert specs["kernel"].a == P("in", None) and specs["kernel"].w == P("in", "out")
        opt = nnx.Optimizer(q, lora_jax.freeze(optax.adam(1e-2), q), wrt=nnx.Param)
        loss = lambda q: (lora_jax.lora(call)(q, X) ** 2).mean()
        values = []
        for _ in range(3):
            value, grads = nnx.value_and_grad(loss)(q)
            opt.update(q, grads)
            values.append(float(value))
    assert values[2] < values[1] < values[0]


# --- Bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["boxed", "plain", "overlay"])
def test_bytes_of_a_tree(form):
    params = boxed() if form == "boxed" else nn.meta.unbox(boxed())
    params = lora_jax.split(params)[1] if form == "overlay" else params
    data = flax.serialization.to_bytes(params)
    target = jax.tree.map(jnp.zeros_like, params)
    again = flax.serialization.from_bytes(target, data)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert sum(map(is_node, jax.tree.leaves(again, is_leaf=is_node))) == 4


def test_bytes_of_the_state_of_the_optimizer():
    params = nn.meta.unbox(boxed())
    ones = jax.tree.map(jnp.ones_like, params)
    for tx in (lora_jax.freeze(optax.adam(1e-2), params), optax.adam(1e-2)):
        _, state = tx.update(ones, tx.init(params), params)
        data = flax.serialization.to_bytes(state)
        again = flax.serialization.from_bytes(tx.init(params), data)
        jax.tree.map(np.testing.assert_array_equal, again, state)
