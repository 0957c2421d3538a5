"""Quantized weights in trees of NNX, Linen and Equinox, and in bytes, pickles and checkpoints."""

import copy
import pickle

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax import export
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from tests.adapters.quantized import tiny
from tests.adapters.quantized.tiny import CONFIG, IDS, KEY, base, loss, model

X = jax.random.normal(KEY, (3, 64))
KIND = "int4"


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_an_nnx_model_trains_with_its_own_optimizer():
    rngs, call = nnx.Rngs(0), lambda net, x: net(x)
    net = lora.quantize(nnx.Linear(64, 32, rngs=rngs), KIND, call, X)
    with pytest.raises(lora.StructureError, match="is a quantized weight"):
        net(X)
    want = lora.dequantize(net)(X)
    np.testing.assert_allclose(lora.lora(call)(net, X), want, atol=1e-5)
    net = lora.init(KEY, net, CONFIG, call, X)
    frozen = jax.tree.map(jnp.copy, lora.split(net)[0].kernel.get_value())
    opt = nnx.Optimizer(net, lora.freeze(optax.adam(0.01), net), wrt=nnx.Param)

    @nnx.jit
    def step(net, opt):
        of = lambda net: (lora.lora(call)(net, X) ** 2).mean()
        value, grads = nnx.value_and_grad(of, allow_int=True)(net)
        opt.update(net, grads)
        return value

    losses = [float(step(net, opt)) for _ in range(20)]
    assert losses[0] == pytest.approx(float((want**2).mean()), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    same(lora.split(net)[0].kernel.get_value(), frozen)
    np.testing.assert_allclose(lora.merge(net)(X), lora.lora(call)(net, X), atol=1e-5)
    graph, state = nnx.split(net)
    np.testing.assert_allclose(lora.lora(call)(nnx.merge(graph, state), X), lora.lora(call)(net, X))


@pytest.mark.parametrize("box", [nn.with_partitioning, nn.with_logical_partitioning])
def test_linen_boxes_keep_their_names(box):
    dense = nn.Dense(32, kernel_init=box(nn.initializers.lecun_normal(), ("fsdp", "mlp")))
    params = lora.quantize(dense.init(KEY, X), "nf4", dense.apply, X)
    adapted = lora.init(KEY, params, CONFIG, dense.apply, X)
    specs = lora.partition_specs(adapted)["params"]["kernel"]
    whole, both = P(None, "mlp"), P("fsdp", "mlp")
    assert specs.w.fields == {"codes": both, "scales": whole, "largest": whole}
    assert (specs.a, specs.b) == (P(None, None), whole)
    assert lora.partition_specs(params)["params"]["kernel"].fields == specs.w.fields
    got = lora.lora(dense.apply)(adapted, X)
    np.testing.assert_allclose(got, dense.apply(lora.dequantize(params), X), atol=1e-5)


def test_equinox_sees_integers_without_gradients():
    weights, static = eqx.partition(eqx.nn.Linear(64, 32, key=KEY), eqx.is_array)
    run = lambda weights, x: jax.vmap(eqx.combine(weights, static))(x)
    params = lora.init(KEY, lora.quantize(weights, KIND, run, X), CONFIG, run, X)
    tx = lora.freeze(optax.adam(0.1), params)

    def step(params, state):
        grads = eqx.filter_grad(lambda p: (lora.lora(run)(p, X) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return lora.apply_updates(params, updates), eqx.apply_updates(params, updates)

    new, also = jax.jit(step)(params, tx.init(params))
    same(lora.split(new)[0], lora.split(params)[0])
    same(new, also)
    assert jnp.abs(new.weight.b).max() == pytest.approx(0.1, rel=1e-3)


def test_bytes_pickles_and_copies():
    for tree in (base(), tiny.joined()):
        same(serialization.from_bytes(tree, serialization.to_bytes(tree)), tree)
        same(pickle.loads(pickle.dumps(tree)), tree)
        same(copy.deepcopy(tree), tree)
    tx = lora.freeze(optax.adam(0.1), tiny.joined())
    state = tx.init(tiny.joined())
    same(serialization.from_bytes(state, serialization.to_bytes(state)), state)


@pytest.mark.slow
def test_a_function_of_codes_is_exported():
    tree = tiny.joined()
    stored = export.export(jax.jit(lora.lora(model)))(tree, IDS).serialize()
    got = export.deserialize(stored).call(tree, IDS)
    np.testing.assert_allclose(got, lora.lora(model)(tree, IDS), atol=1e-5)


@pytest.mark.slow
def test_orbax_restores_codes(tmp_path):
    import orbax.checkpoint as ocp

    tree = tiny.joined()
    shardings = lora.shardings(tree)
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "joined", tree)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "joined", jax.tree.map(place, tree, shardings)), tree)


@pytest.mark.slow
def test_a_line_search_trains_a_joined_tree():
    params = tiny.joined()
    tx = lora.freeze(optax.lbfgs(), params)
    state, before = tx.init(params), loss(params)
    step = lora.value_and_grad_from_state(loss)

    @jax.jit
    def update(params, state):
        value, grads = step(params, state=state)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return lora.apply_updates(params, updates), state

    for _ in range(3):
        params, state = update(params, state)
    assert loss(params) < before
    same(lora.split(params)[0], base())
