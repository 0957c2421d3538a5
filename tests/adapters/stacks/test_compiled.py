"""Stacks in compiled, exported and restored programs, and on meshes."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora

BASE = {"up": jnp.cos(jnp.arange(128.0)).reshape(8, 16), "bias": jnp.ones(16)}
CONFIGS = [lora.LoraConfig(rank=1), lora.LoraConfig(rank=3, dora=True, train=["bias"])]
X = jnp.sin(jnp.arange(32.0)).reshape(4, 8)
IDS = jnp.array([0, 1, -1, 1])


def adapters(base):
    moved = lambda x, label: x + 0.1 if label == "train" else x
    for i, config in enumerate(CONFIGS):
        params = lora.init(jax.random.key(i), base, config)
        yield lora.split(jax.tree.map(moved, params, lora.labels(params)))[1]


def model(params, x):
    return jnp.tanh(x @ params["up"] + params["bias"][None])


def rows(params, x, ids):
    return lora.lora(model, adapters_of=ids)(params, x)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_exported_restored_and_donated(tmp_path):
    first, second = adapters(BASE)
    stack = lora.stack([first, second])
    joined = lora.join(BASE, stack)
    exported = export.export(jax.jit(rows))(joined, X, IDS).serialize()
    got = export.deserialize(exported).call(joined, X, IDS)
    want = [lora.merge(lora.join(BASE, x)) for x in (first, second)] + [BASE]
    for i, slot in enumerate(IDS):
        np.testing.assert_allclose(got[i], model(want[slot], X[i : i + 1])[0], rtol=1e-5, atol=1e-6)
    data = flax.serialization.to_bytes(stack)
    equal(flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, stack), data), stack)
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(tmp_path / "stack", stack)
    checkpointer.wait_until_finished()
    equal(
        checkpointer.restore(
            tmp_path / "stack", lora.stack(jax.eval_shape(lambda: [first, second]))
        ),
        stack,
    )
    swap = jax.jit(lora.set_slot, donate_argnums=0)
    swapped = swap(stack, 1, first)
    assert stack["up"].a.is_deleted()
    moved = swap(swapped, 0, lora.select(swapped, -1))  # of the stack's own rank and kind
    assert [jax.tree.leaves(x) != [] for x in lora.unstack(moved)] == [False, True]
    equal(lora.unstack(moved)[1], first)


def test_what_was_written_before_there_were_stacks():
    """Bytes of flax from then lack the field `slot`."""
    (first, _) = adapters(BASE)
    state = flax.serialization.to_state_dict(first)
    for node in state.values():
        if node is not None:
            del node["slot"]
    equal(flax.serialization.from_state_dict(jax.tree.map(jnp.zeros_like, first), state), first)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_on_a_mesh_the_slots_are_on_every_device_or_sharded():
    mesh = jax.make_mesh((2, 2), ("tensor", "slots"), axis_types=(AxisType.Auto,) * 2)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    base = {"up": place(BASE["up"], None, "tensor"), "bias": place(BASE["bias"], "tensor")}
    stack = lora.stack(list(adapters(base)))
    assert stack["up"].b.sharding.spec == P(None, None, "tensor")
    assert stack["up"].a.sharding == NamedSharding(mesh, P())
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    shapes = lora.stack(jax.tree.map(abstract, list(adapters(base))))
    joined = lora.join(base, stack)
    by_slot = lora.shardings(joined, slots="slots")
    assert by_slot["up"].b.spec == P("slots", None, "tensor")
    assert (by_slot["up"].a.spec, by_slot["up"].w.spec) == (P("slots"), P(None, "tensor"))
    assert by_slot["bias"].value.spec == P("slots", "tensor")
    both = lora.shardings(joined, slots="tensor")["up"]  # the out axis cannot have it too
    assert both.b.spec == P("tensor")
    assert lora.shardings(lora.join(base, shapes))["up"].b.spec == P(None, None, "tensor")
    with pytest.raises(
        lora.ConfigError, match=r"slots='x' is not an axis of the weights' mesh; they have"
    ):
        lora.shardings(joined, slots="x")

    def loss(overlay, base):
        return (lora.lora(model)(lora.join(base, overlay), X) ** 2).mean()

    def step(overlay, state, base):
        tx = lora.freeze(optax.adam(0.1), overlay)
        state = tx.init(overlay) if state is None else state
        values, grads = jax.vmap(jax.value_and_grad(loss), (0, None))(overlay, base)
        updates, state = tx.update(grads, state, overlay)
        return lora.apply_updates(overlay, updates), state, values

    sharded = jax.device_put(stack, lora.split(by_slot)[1])
    after, _, values = jax.jit(step)(sharded, None, base)
    assert after["up"].b.sharding.spec == P("slots", None, "tensor")
    plain, _, want = jax.jit(step)(*jax.device_get((stack, None, BASE)))
    np.testing.assert_allclose(values, want, rtol=1e-6)
    np.testing.assert_allclose(after["up"].b, plain["up"].b, rtol=1e-6, atol=1e-6)
