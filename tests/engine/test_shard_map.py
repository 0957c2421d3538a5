"""Sharded weights beyond the table of programs: sharding in types, shapes of shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from tests.programs import merged, normal, randomize
from tests.programs.jaxprs import weight_sized

SPECS = {"up": P(None, "t"), "down": P("t", None), "head": P("d", None)}
SHAPES = {"up": (6, 16), "down": (16, 10), "head": (10, 22)}


def block(mesh):
    """Columns, then rows, then a weight whose shards are gathered."""

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(SPECS, P("d", None)), out_specs=P("d", None)
    )
    def fn(params, x):
        h = jax.lax.psum(jnp.tanh(x @ params["up"]) @ params["down"], "t")
        return h @ jax.lax.all_gather(params["head"], "d", axis=0, tiled=True)

    return fn


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_layers_sharded_by_columns_by_rows_and_to_be_gathered(kind, x64, quick_compile):
    mesh = jax.make_mesh((2, 2), ("d", "t"), axis_types=(getattr(AxisType, kind),) * 2)
    fn, x = block(mesh), normal(0, (14, 6), jnp.float64)
    params = {name: normal(i, shape, jnp.float64) for i, (name, shape) in enumerate(SHAPES.items())}
    config = lora_jax.LoraConfig(rank=1, dtype=jnp.float64)
    with jax.set_mesh(mesh):
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        x = place(x, P("d", None))
        params = {name: place(w, SPECS[name]) for name, w in params.items()}
        adapted = lora_jax.init(jax.random.key(0), params, config, fn, x)
        base, adapters = lora_jax.split(randomize(adapted))
        apply = lora_jax.lora(fn, on_dense="error")

        def loss(run, adapters):
            return jnp.sin(run(lora_jax.join(base, adapters), x)).sum()

        ours = functools.partial(loss, apply)
        oracle = functools.partial(loss, lambda params, x: fn(merged(params), x))
        got, grads = jax.jit(jax.value_and_grad(ours))(adapters)
        want, expected = jax.jit(jax.value_and_grad(oracle))(adapters)
        traced = jax.make_jaxpr(jax.grad(ours))(adapters)
    np.testing.assert_allclose(got, want, rtol=1e-10)
    for name in SHAPES:
        for factor in ("a", "b"):
            g, e = getattr(grads[name], factor), getattr(expected[name], factor)
            np.testing.assert_allclose(g, e, rtol=1e-10, atol=1e-10)
    # Nor is a shard of W + A·B made: what has its shape is the shard itself, cast in type. (The
    # shards of a factor are saved as one array: of rank 1 they have no shape of a weight's.)
    shards = weight_sized(traced.jaxpr, {(6, 8), (8, 10), (5, 22)})
    plain = jax.make_jaxpr(jax.grad(lambda x: jnp.sin(fn(base, x)).sum()))
    with jax.set_mesh(mesh):
        assert shards <= weight_sized(plain(x).jaxpr, {(6, 8), (8, 10), (5, 22)})


def test_lora_inside_a_shard_map_of_weights_that_are_sharded_in_different_ways():
    """Their factors vary over different mesh axes, those of two that meet one activation too."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    shapes = {"up": (7, 8), "down": (8, 7), "whole": (7, 5)}
    params = {name: normal(i, shape, jnp.float32) for i, (name, shape) in enumerate(shapes.items())}
    x = normal(9, (3, 7), jnp.float32)

    def block(params, x):
        h = jnp.tanh(x @ params["up"]) @ params["down"]
        return jax.lax.psum(h, "d") @ params["whole"] + jnp.sin(x @ params["whole"])

    adapted = randomize(lora_jax.init(jax.random.key(0), params, lora_jax.LoraConfig(rank=2)))

    def spec(name, w, a, b):
        return lora_jax.LoraWeight(w, a, b, P(), layout=adapted[name].layout)

    specs = {
        "up": spec("up", P(None, "d"), P(), P(None, "d")),
        "down": spec("down", P("d"), P("d"), P()),
        "whole": spec("whole", P(), P(), P()),
    }
    mapped = jax.shard_map(
        lora_jax.lora(block, on_dense="error"),
        mesh=mesh,
        in_specs=(specs, P()),
        out_specs=P(),
    )
    plain = jax.shard_map(
        block,
        mesh=mesh,
        in_specs=({name: s.w for name, s in specs.items()}, P()),
        out_specs=P(),
    )
    got, want = jax.jit(mapped)(adapted, x), jax.jit(plain)(merged(adapted), x)
    np.testing.assert_allclose(got, want, atol=2e-5)
