"""split, join, set_scale, disable: two views of one thing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax
from lora_jax import LoraConfig, StructureError, TargetError
from tests.programs import is_node, randomize

KEY = jax.random.key(0)
PARAMS = {
    "up": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)},
    "layers": [{"kernel": jnp.ones((6, 5))}, {"kernel": jnp.ones((5, 3))}],
    "norm": {"scale": jnp.ones(3)},
}
JOINED = randomize(lora_jax.init(KEY, PARAMS, LoraConfig(rank=2, train=["norm"])))


def test_split_gives_the_same_arrays_and_a_partial_tree():
    base, adapters = lora_jax.split(JOINED)
    assert jax.tree.structure(base) == jax.tree.structure(PARAMS)
    assert all(x is y for x, y in zip(jax.tree.leaves(base), jax.tree.leaves(PARAMS), strict=True))
    assert adapters["up"]["bias"] is None and adapters["up"]["kernel"].w is None
    assert adapters["norm"]["scale"].w is None
    assert len(jax.tree.leaves(adapters)) == 3 * 3 + 2


def test_join_is_the_inverse():
    joined = lora_jax.join(*lora_jax.split(JOINED))
    assert jax.tree.structure(joined) == jax.tree.structure(JOINED)
    assert all(
        x is y for x, y in zip(jax.tree.leaves(joined), jax.tree.leaves(JOINED), strict=True)
    )


def test_one_base_and_stacked_overlays_under_vmap():
    base, adapters = lora_jax.split(JOINED)
    other = jax.tree.map(lambda x: 2 * x, adapters)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), adapters, other)

    def fn(params, x):
        for layer in (params["up"], *params["layers"]):
            x = x @ layer["kernel"]
        return x

    x = jnp.ones((2, 4))
    outs = jax.vmap(lambda a: lora_jax.lora(fn)(lora_jax.join(base, a), x))(stacked)
    for out, overlay in zip(outs, (adapters, other), strict=True):
        want = lora_jax.lora(fn)(lora_jax.join(base, overlay), x)
        np.testing.assert_allclose(out, want, rtol=1e-5)


def test_nnx_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    graph, state = nnx.split(Model(nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)
    x = jnp.ones((2, 4))
    joined = randomize(lora_jax.init(KEY, state, LoraConfig(rank=2), fn, x))
    base, adapters = lora_jax.split(joined)
    got = jax.jit(lora_jax.lora(fn))(lora_jax.join(base, adapters), x)
    np.testing.assert_allclose(got, fn(lora_jax.merge(joined), x), rtol=1e-5)
    assert jax.tree.structure(base) == jax.tree.structure(state)


def test_join_lists_all_differences_at_once():
    _, adapters = lora_jax.split(JOINED)
    base = {
        "up": {"kernel": jnp.ones((4, 7)), "bias": jnp.zeros(6)},
        "layers": [{"kernel": jnp.ones((6, 5))}, {"kernel": jnp.ones((5, 3, 1))}],
        "norm": {"scael": jnp.ones(3)},
    }
    with pytest.raises(StructureError) as error:
        lora_jax.join(base, adapters)
    message = str(error.value)
    assert "up/kernel: b is (2, 6)" in message
    assert "layers/1/kernel: layout 'io'" in message
    assert "norm/scale: not in the base" in message and "norm/scael" in message
    assert "layers/0/kernel:" not in message


@pytest.mark.parametrize(
    ("base", "adapters", "match"),
    [
        (JOINED, lora_jax.split(JOINED)[1], "adapted already"),
        (PARAMS, {}, "no adapters"),
        (PARAMS, PARAMS, "not an adapter"),
    ],
)
def test_join_refuses(base, adapters, match):
    with pytest.raises(StructureError, match=match):
        lora_jax.join(base, adapters)


def test_split_refuses():
    with pytest.raises(StructureError, match="the tree contains no adapters"):
        lora_jax.split(PARAMS)
    with pytest.raises(StructureError, match="join"):
        lora_jax.split(lora_jax.split(JOINED)[1])


def test_set_scale_everywhere_and_by_pattern():
    scales = lambda p: [float(n.scale) for n in jax.tree.leaves(p, is_leaf=is_node) if is_node(n)]
    assert scales(lora_jax.set_scale(JOINED, 0.5)) == [0.5] * 4
    assert scales(lora_jax.set_scale(JOINED, 0.5, ["up/kernel"])) == [1, 1, 1, 0.5]
    _, adapters = lora_jax.split(JOINED)
    assert scales(lora_jax.disable(adapters)) == [0] * 4
    with pytest.raises(TargetError, match="'down'"):
        lora_jax.set_scale(JOINED, 0.5, ["down"])
    with pytest.raises(StructureError):
        lora_jax.set_scale(PARAMS, 0.5)


def test_set_scale_of_stacked_weights():
    stacked = {"w": jnp.ones((3, 4, 5))}
    config = LoraConfig(rank=1, overrides={"w": {"layout": "bio"}})
    joined = lora_jax.set_scale(lora_jax.init(KEY, stacked, LoraConfig(**vars(config))), 0.5)
    np.testing.assert_array_equal(joined["w"].scale, [0.5] * 3)


def test_disable_gives_back_leaves_trained_whole_too():
    trained = jax.tree.map(lambda x: x, JOINED)
    node = trained["norm"]["scale"]
    trained["norm"]["scale"] = type(node)(node.w, node.value + 7, node.scale)
    fn = lambda p, x: (x @ p["up"]["kernel"]).sum() * p["norm"]["scale"]
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(lora_jax.lora(fn)(lora_jax.disable(trained), x), fn(PARAMS, x))
    assert float(lora_jax.lora(fn)(trained, x)[0]) != float(fn(PARAMS, x)[0])


@pytest.mark.parametrize("scale", [0.5, jnp.float32(0.5)], ids=["number", "array"])
def test_every_node_owns_its_scale(scale):
    """A step that donates the tree may not get one buffer twice."""
    joined = jax.tree.map(lambda x: jnp.array(x, copy=True), JOINED)
    params = lora_jax.set_scale(joined, scale)
    scales = [node.scale for node in jax.tree.leaves(params, is_leaf=is_node) if is_node(node)]
    assert len({x.unsafe_buffer_pointer() for x in scales}) == len(scales)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    new = step(params)
    assert all(x.is_deleted() for x in scales)
    nodes = [node for node in jax.tree.leaves(new, is_leaf=is_node) if is_node(node)]
    assert [float(node.scale) for node in nodes] == [1.5] * 4
