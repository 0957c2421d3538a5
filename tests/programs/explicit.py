"""Programs on a mesh whose axes are explicit, so that shardings are part of the types.

Each is built twice: with `at` for a mesh of four devices, and with `nowhere` for one device, where
it is the same program without shardings: the oracle.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.programs.table import normal

DTYPE = "float64"


class At(NamedTuple):
    """Where arrays are: on a mesh, or for the oracle on no mesh."""

    mesh: Any

    def spec(self, *entries):
        """Return a sharding for `out_sharding=`; None on no mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, P(*entries))

    def put(self, x, *entries):
        return x if self.mesh is None else jax.device_put(x, self.spec(*entries))

    def reshard(self, x, *entries):
        return x if self.mesh is None else jax.sharding.reshard(x, self.spec(*entries))


#: By name, `build(at)`, which returns (fn, params, args).
EXPLICIT: dict[str, Callable[[At], tuple[Callable, Any, tuple]]] = {}


def program(build: Callable) -> Callable:
    EXPLICIT[build.__name__] = build
    return build


def columns(at: At, *shape: int, seed: int = 1) -> jax.Array:
    """Return a kernel whose outputs are sharded, as `P(None, 'm')` says."""
    return at.put(normal(seed, shape, DTYPE, 0.3), *[None] * (len(shape) - 1), "m")


def tokens(at: At, *entries: Any, shape: Any = (4, 6, 8)) -> jax.Array:
    return at.put(normal(0, shape, DTYPE), *entries)


@program
def matrix(at):
    return lambda p, x: jnp.tanh(x @ p["w"]), {"w": columns(at, 8, 12)}, (tokens(at),)


@program
def matrix_and_sharded_tokens(at):
    return lambda p, x: jnp.tanh(x @ p["w"]), {"w": columns(at, 8, 12)}, (tokens(at, "d"),)


@program
def sharded_inputs(at):
    x = tokens(at, None, None, "d")
    return lambda p, x: jnp.tanh(x @ p["w"]), {"w": columns(at, 8, 12)}, (x,)


@program
def weight_on_no_mesh(at):
    x = tokens(at, "d")
    return lambda p, x: jnp.tanh(x @ p["w"]), {"w": normal(1, (8, 12), DTYPE)}, (x,)


@program
def a_replicated_weight_after_a_sharded_one(at):
    params = {"up": columns(at, 8, 12), "down": at.put(normal(2, (12, 8), DTYPE))}
    return lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, (at.put(tokens(at)),)


@program
def columns_then_rows(at):
    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        return jnp.einsum("bth,ho->bto", h, p["down"], out_sharding=at.spec("d"))

    params = {"up": columns(at, 8, 12), "down": at.put(normal(2, (12, 8), DTYPE), "m")}
    return fn, params, (tokens(at, "d"),)


@program
def attention(at):
    def fn(p, x):
        q, k = (jnp.einsum("bte,ehd->bthd", x, p[name]) for name in "qk")
        scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k), -1)
        v = jnp.einsum("bhts,bshd->bthd", scores, k)
        return jnp.einsum("bthd,hde->bte", v, p["o"], out_sharding=at.spec("d"))

    q, k = (at.put(normal(i, (8, 4, 3), DTYPE, 0.3), None, "m") for i in (1, 2))
    o = at.put(normal(3, (4, 3, 8), DTYPE), "m")
    return fn, {"q": q, "k": k, "o": o}, (tokens(at, "d"),)


@program
def weights_that_share_an_activation(at):
    def fn(p, x):
        return jnp.sin(x @ p["q"]) * jnp.cos(x @ p["k"]) + jnp.tanh(x @ p["v"])

    params = {name: columns(at, 8, 12, seed=i) for i, name in enumerate("qk", 1)}
    params["v"] = at.put(normal(3, (8, 12), DTYPE))
    return fn, params, (tokens(at, "d"),)


@program
def weight_on_the_left(at):
    def fn(p, x):
        return jnp.einsum("ehd,bte->hbtd", p["w"], x)

    return fn, {"w": at.put(normal(1, (8, 4, 3), DTYPE), None, "m")}, (tokens(at, "d"),)


@program
def inputs_and_outputs_sharded(at):
    """Each device has a part of the inputs, too (FSDP), on the mesh axis of the tokens."""

    def fn(p, x):
        return jnp.matmul(x, p["w"], out_sharding=at.spec("d"))

    return fn, {"w": at.put(normal(1, (8, 12), DTYPE), "d", "m")}, (tokens(at, "d"),)


@program
def inputs_gathered_first(at):
    def fn(p, x):
        return jnp.tanh(x @ at.reshard(p["w"], None, "m"))

    return fn, {"w": at.put(normal(1, (8, 12), DTYPE), "d", "m")}, (tokens(at, "d"),)


@program
def axes_made_automatic(at):
    def product(w, x):
        return jnp.tanh(x @ w)

    def fn(p, x):
        if at.mesh is None:
            return product(p["w"], x)
        return jax.sharding.auto_axes(product, out_sharding=at.spec("d", None, "m"))(p["w"], x)

    return fn, {"w": columns(at, 8, 12)}, (tokens(at, "d"),)


@program
def convolution(at):
    def fn(p, x):
        return lax.conv_general_dilated(
            *(x, p["w"], (1,), "SAME"), dimension_numbers=("NWC", "WIO", "NWC")
        )

    return fn, {"w": at.put(normal(1, (3, 8, 12), DTYPE))}, (tokens(at, "d"),)


@program
def convolution_that_says_its_sharding(at):
    def fn(p, x):
        return lax.conv_general_dilated(
            *(x, p["w"], (1,), "SAME"),
            dimension_numbers=("NWC", "WIO", "NWC"),
            out_sharding=at.spec("d", None, "m"),
        )

    return fn, {"w": columns(at, 3, 8, 12)}, (tokens(at, "d"),)


@program
def convolution_in_groups(at):
    def fn(p, x):
        return lax.conv_general_dilated(
            *(x, p["w"], (1,), "SAME"),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )

    # Not along the batch: XLA's own gradient of such a kernel is then twice what it should be.
    return fn, {"w": at.put(normal(1, (3, 4, 12), DTYPE))}, (at.put(tokens(at)),)


@program
def scan(at):
    def layer(h, w):
        return jnp.matmul(jnp.tanh(h @ w["up"]), w["down"], out_sharding=at.spec("d")), None

    down = at.put(normal(2, (3, 12, 8), DTYPE, 0.3), None, "m")
    params = {"up": columns(at, 3, 8, 12), "down": down}
    return lambda p, x: lax.scan(layer, x, p)[0], params, (tokens(at, "d"),)


@program
def scan_of_a_checkpoint(at):
    _, params, args = scan(at)

    @jax.checkpoint
    def layer(h, w):
        return jnp.matmul(jnp.tanh(h @ w["up"]), w["down"], out_sharding=at.spec("d")), None

    return lambda p, x: lax.scan(layer, x, p)[0], params, args


@program
def checkpoint_with_a_policy(at):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def block(p, x):
        return jnp.matmul(jnp.tanh(x @ p["up"]), p["down"], out_sharding=at.spec("d"))

    _, params, args = columns_then_rows(at)
    return jax.checkpoint(block, policy=policy), params, args


@program
def experts(at):
    def fn(p, x):
        return jnp.einsum("ebi,eio->ebo", x, p["w"])

    return fn, {"w": at.put(normal(1, (4, 8, 12), DTYPE), "m")}, (tokens(at, "m"),)


@program
def lookup_and_attend(at):
    def fn(p, ids):
        x = p["e"].at[ids].get(out_sharding=at.spec("d"))
        return jnp.matmul(jnp.tanh(x), p["e"].T, out_sharding=at.spec("d", None, "m"))

    ids = at.put(jnp.arange(8).reshape(4, 2) % 7, "d")
    return fn, {"e": at.put(normal(1, (16, 8), DTYPE), "m")}, (ids,)


@program
def branches(at):
    def fn(p, x):
        return lax.cond(x.sum() > 0, lambda w, x: x @ w, lambda w, x: jnp.sin(x @ w), p["w"], x)

    return fn, {"w": columns(at, 8, 12)}, (tokens(at, "d"),)


@program
def custom_derivative(at):
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    def backward(saved, ct):
        x, w = saved
        dx = jnp.einsum("bto,io->bti", ct, w, out_sharding=at.spec("d"))
        return dx, jnp.einsum("bti,bto->io", x, ct, out_sharding=at.spec(None, "m"))

    product.defvjp(lambda x, w: (x @ w, (x, w)), backward)
    return lambda p, x: jnp.sin(product(x, p["w"])), {"w": columns(at, 8, 12)}, (tokens(at, "d"),)


@program
def concatenated(at):
    def fn(p, x):
        return jnp.tanh(x @ jnp.concatenate([p["q"], p["k"]], 0))

    params = {"q": columns(at, 4, 12), "k": columns(at, 4, 12, seed=2)}
    return fn, params, (tokens(at, "d"),)


@program
def mapped(at):
    def fn(p, x):
        return jax.vmap(jax.vmap(lambda row: jnp.tanh(row @ p["w"])))(x)

    return fn, {"w": columns(at, 8, 12)}, (tokens(at, "d"),)
