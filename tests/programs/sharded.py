"""Programs that `shard_map` runs on four devices, the weights sharded among them."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.programs.table import case, normal


def mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def pair(dtype):
    """The two layers of a block; the inner axis is the one that is sharded."""
    return {"up": normal(1, (6, 12), dtype), "down": normal(2, (12, 10), dtype)}


@case(layouts={"up": "io", "down": "io"})
def shard_map_of_the_batch(dtype):
    def fn(params, x):
        mapped = functools.partial(
            jax.shard_map, mesh=mesh(d=4), in_specs=(P(), P("d")), out_specs=P("d")
        )
        return mapped(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"])(params, x)

    return fn, pair(dtype), (normal(0, (8, 6), dtype),)


@case(layouts={"up": "io", "down": "io"})
def shard_map_tensor_parallel(dtype):
    """The first layer by columns, the second by rows, the batch along the other axis."""

    def fn(params, x):
        @functools.partial(
            jax.shard_map,
            mesh=mesh(d=2, t=2),
            in_specs=({"up": P(None, "t"), "down": P("t")}, P("d")),
            out_specs=P("d"),
        )
        def block(params, x):
            return jax.lax.psum(jnp.tanh(x @ params["up"]) @ params["down"], "t")

        return block(params, x)

    return fn, pair(dtype), (normal(0, (4, 6), dtype),)


@case(layouts={"up": "io", "down": "io"})
def shard_map_unchecked(dtype):
    """Varying types are not checked, and only one of the mesh's axes is manual."""

    def fn(params, x):
        @functools.partial(
            jax.shard_map,
            mesh=mesh(d=2, t=2),
            in_specs=(P("t", None), P(None, "t"), P()),
            out_specs=P(),
            axis_names={"t"},
            check_vma=False,
        )
        def block(down, up, x):
            return jax.lax.psum(jnp.tanh(x @ up) @ down, "t")

        return block(params["down"], params["up"], x)

    # only under jit does JAX itself run it
    return jax.jit(fn), pair(dtype), (normal(0, (4, 6), dtype),)


@case(layouts={"up": "io", "down": "io"})
def shard_map_that_gathers_its_weights(dtype):
    def fn(params, x):
        @functools.partial(
            jax.shard_map, mesh=mesh(d=4), in_specs=(P("d"), P(None, "d"), P("d")), out_specs=P("d")
        )
        def block(down, up, x):
            up = jax.lax.all_gather(up, "d", axis=1, tiled=True)
            return jnp.tanh(x @ up) @ jax.lax.all_gather(down, "d", axis=0, tiled=True)

        return block(params["down"], params["up"], x)

    return fn, pair(dtype), (normal(0, (4, 6), dtype) / 2,)


@case(layouts={"w": "bio"})
def shard_map_of_experts(dtype):
    """A batch axis, which both factors have, is sharded."""

    def fn(params, x):
        mapped = functools.partial(
            jax.shard_map, mesh=mesh(e=4), in_specs=(P("e"), P("e")), out_specs=P("e")
        )
        return mapped(lambda w, x: jnp.einsum("eki,eti->etk", w.transpose(0, 2, 1), x))(
            params["w"], x
        )

    return fn, {"w": normal(1, (4, 7, 5), dtype)}, (normal(0, (4, 3, 7), dtype),)


@case(layouts={"w": "io"}, reverse=False)
def shard_map_in_a_shard_map(dtype):
    def fn(params, x):
        @functools.partial(
            jax.shard_map,
            mesh=mesh(d=2, t=2),
            in_specs=(P(), P("d")),
            out_specs=P("d"),
            axis_names={"d"},
        )
        def outer(w, x):
            @functools.partial(
                jax.shard_map, in_specs=(P("t"), P(None, "t")), out_specs=P(), axis_names={"t"}
            )
            def inner(w, x):
                return jax.lax.psum(x @ w, "t")

            return jnp.sin(inner(w.reshape(6, 10), x))

        return outer(params["w"], x)

    return jax.jit(fn), {"w": normal(1, (6, 10), dtype)}, (normal(0, (4, 6), dtype),)


@case(layouts={"w": "io"}, dense="shard_map")
def shard_map_that_returns_its_weight(dtype):
    def fn(params, x):
        mapped = functools.partial(
            jax.shard_map, mesh=mesh(d=2), in_specs=(P("d"), P()), out_specs=(P("d"), P("d", None))
        )
        w, y = mapped(lambda w, x: (w * 2, x[:, :3] @ w))(params["w"], x)
        return x @ w + y[:4] + y[4:]

    return fn, {"w": normal(1, (6, 10), dtype)}, (normal(0, (4, 6), dtype),)


@case(layouts={"w": "io"}, dense="all_gather")
def shard_map_that_gathers_other_columns(dtype):
    """The rows are gathered along the mesh axis that shards the columns: B differs on devices."""

    def fn(params, x):
        @functools.partial(
            jax.shard_map, mesh=mesh(d=2), in_specs=(P(None, "d"), P()), out_specs=P(None, "d")
        )
        def block(w, x):
            w = jax.lax.all_gather(w, "d", axis=0, tiled=True)  # [2K, N/2]
            return x @ w[3:9]

        return block(params["w"], x)

    return fn, {"w": normal(1, (6, 10), dtype)}, (normal(0, (4, 6), dtype),)
