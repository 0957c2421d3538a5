"""Training with adapters on a mesh: in a loop, inside `shard_map`, and in Flax's boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import LoraConfig
from tests.adapters.on_a_mesh import KEY, MESH, WANTED, base, make_mesh, product, put, specs
from tests.programs import is_node, randomize


@pytest.mark.parametrize("form", ["joined", "split"])
def test_a_loop_compiles_once_and_keeps_its_shardings(form):
    params = {name: base()[name] for name in ("up", "down")}
    x = put((8, 8), "fsdp", seed=7)
    config = LoraConfig(rank=2, dora=True)
    tree = lora_jax.init(KEY, params, config, product, x)
    frozen, trained = lora_jax.split(tree) if form == "split" else (None, tree)
    tx = lora_jax.freeze(optax.adam(1e-2), trained)
    run = lora_jax.lora(product)

    @jax.jit
    def step(frozen, trained, state, x):
        whole = lambda t: t if frozen is None else lora_jax.join(frozen, t)
        grads = jax.grad(lambda t: (run(whole(t), x) ** 2).mean())(trained)
        updates, state = tx.update(grads, state, trained)
        return lora_jax.apply_updates(trained, updates), state

    state, before = tx.init(trained), jax.tree.map(lambda x: x.sharding, trained)
    for _ in range(3):
        trained, state = step(frozen, trained, state, x)
    assert step._cache_size() == 1
    after = jax.tree.map(lambda x: x.sharding, trained)
    assert jax.tree.all(jax.tree.map(lambda x, y: x == y, before, after))
    nodes = [x for x in jax.tree.leaves(trained, is_leaf=is_node) if is_node(x)]
    moments = jax.tree.leaves(state.inner_states["train"].inner_state[0].mu)
    assert {x.sharding for x in moments} == {
        y.sharding for n in nodes for y in (n.a, n.b, n.magnitude)
    }


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_make_step_compiles_once(accumulate):
    from lora_jax import training

    params = {name: base()[name] for name in ("up", "down")}
    batch = {"x": put((8, 8), "fsdp", seed=7)}
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2), product, batch["x"])
    frozen, adapters = lora_jax.split(tree)

    def loss(params, batch):
        out = product(params, batch["x"])
        return {"loss": (out**2).sum(), "weight": jnp.float32(out.size)}

    tx = training.Optimizer(1e-2).transformation(adapters, steps=3)
    state, step = training.init_state(adapters, tx), training.make_step(loss, tx, accumulate)
    assert all(isinstance(x.sharding, NamedSharding) for x in jax.tree.leaves(state))
    before, losses = jax.tree.map(lambda x: x.sharding, state), []
    for _ in range(3):
        state, measured = step(state, frozen, batch)
        losses.append(float(measured["loss"]))
    assert step._cache_size() == 1 and losses[2] < losses[0]
    assert jax.tree.all(jax.tree.map(lambda x, y: x == y.sharding, before, state))


# --- Inside shard_map, in boxes -------------------------------------------------------------------


def test_a_manual_mesh():
    """`lora` inside `shard_map`: Megatron's layer, whose one sum serves W and the factors."""
    mesh = make_mesh(data=2, tensor=4)
    params = {
        "up": put((8, 16), None, "tensor", mesh=mesh),
        "down": put((16, 8), "tensor", mesh=mesh, seed=2),
    }
    x = put((4, 8), "data", mesh=mesh, seed=3)
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2), product, x)
    tree = jax.device_put(randomize(tree), lora_jax.shardings(tree))
    specs = jax.tree.map(lambda s: s.spec, lora_jax.shardings(tree))

    def layer(params, x):
        return jax.lax.psum(lora_jax.lora(product)(params, x), "tensor")

    options = {"mesh": mesh, "in_specs": (specs, P("data")), "out_specs": P("data")}
    run = jax.jit(jax.shard_map(layer, **options))
    loss = lambda run, p, x: (run(p, x) ** 2).mean()
    nodes = jax.tree.map(np.asarray, tree)
    plain = {
        name: n.w.astype(np.float64) + n.scale * n.a.astype(np.float64) @ n.b
        for name, n in nodes.items()
    }
    want = np.tanh(np.asarray(x, np.float64) @ plain["up"]) @ plain["down"]
    np.testing.assert_allclose(run(tree, x), want, rtol=2e-5, atol=1e-5)
    got = jax.grad(loss, argnums=1)(run, tree, x)
    whole = jax.grad(loss, argnums=1)(lora_jax.lora(product), nodes, np.asarray(x))
    for name in params:
        for field in ("a", "b"):
            pair = getattr(got[name], field), getattr(whole[name], field)
            np.testing.assert_allclose(*pair, rtol=2e-5, atol=1e-5)


def test_boxes_of_flax_keep_their_names_and_their_arrays_their_places():
    import flax.linen as nn
    from flax import nnx

    box = lambda x: nn.Partitioned(x, names=("fsdp", "tensor"))
    params = {"up": box(base()["up"])}
    fn = lambda params, x: x @ params["up"].value
    x = put((8, 8), "fsdp", seed=7)
    tree = lora_jax.init(KEY, params, LoraConfig(rank=2), fn, x)
    frozen, adapters = lora_jax.split(tree)
    for found in (tree, lora_jax.join(frozen, adapters)):
        assert found["up"].names == ("fsdp", "tensor")
        assert specs(found)["up"].value.b == WANTED["up"][1]
    assert frozen["up"].value is params["up"].value
    assert frozen["up"].names == lora_jax.merge(tree)["up"].names == ("fsdp", "tensor")
    by_name = lora_jax.partition_specs(tree)["up"]
    assert (by_name.w, by_name.a, by_name.b) == (
        P("fsdp", "tensor"),
        P(None, None),
        P(None, "tensor"),
    )
    assert lora_jax.partition_specs(tree, fsdp=())["up"].a == P("fsdp", None)

    with jax.set_mesh(MESH):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
        model = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
        model = lora_jax.init(KEY, model, LoraConfig(rank=2), lambda net, x: net(x), x)
    node = model.kernel.get_value()
    assert node.w.sharding.spec == P("fsdp", "tensor") and node.b.sharding.spec == P(None, "tensor")
    assert node.a.sharding.spec == P()
