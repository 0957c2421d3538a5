"""`jit` and `remat`, rebuilt around lazy weights.

A `LazyWeight` is a pytree, so it passes through JAX's own `jit`, `checkpoint` and control flow.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from lora_jax.engine import jaxprs, remat
from lora_jax.engine.context import Context
from lora_jax.engine.lazy_weight import MEMBERS, LazyWeight, is_lazy
from lora_jax.engine.quantized.specs import shardings_of
from lora_jax.engine.quantized.view import QuantizedView
from lora_jax.engine.rules.registry import Container, Walk, rule

CONTAINERS: dict[str, Container] = {}


@rule(CONTAINERS, "jit", "pjit", "closed_call", "core_call")
def _jit(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Call one jitted function per inner program: what JAX traced once is still traced once."""
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    jaxpr, consts = jaxprs.open_jaxpr(inner)
    site = ctx.next_site()  # a program that is called twice drops other inputs in each call
    args = [_fold_key(x, site) if is_lazy(x) else x for x in args]
    shardings_in, shardings_out = jaxprs.shardings(eqn)
    if any(shardings_in) or any(shardings_out):

        def sharded(*args: Any) -> list[Any]:
            outs = walk(jaxpr, consts, args)
            pairs = zip(outs, shardings_out, strict=True)
            return [ctx.densify(x, eqn) if is_lazy(x) and s else x for x, s in pairs]

        where = tuple(_sharding_of(x, s) for x, s in zip(args, shardings_in, strict=True))
        return jax.jit(sharded, in_shardings=where, out_shardings=list(shardings_out))(*args)
    if id(inner) not in ctx.jitted:

        def call(*args: Any) -> list[Any]:
            return walk(jaxpr, consts, args)

        call.__name__ = call.__qualname__ = eqn.params.get("name", "call")
        ctx.jitted[id(inner)] = (
            jax.jit(call),
            inner,
        )  # `inner` is kept alive, or its id could be reused
    return ctx.jitted[id(inner)][0](*args)


def _fold_key(lazy: LazyWeight, site: int) -> LazyWeight:
    """Return the weight with another dropout key, if it has one."""
    if lazy.key is None:
        return lazy
    keys = jax.vmap(jax.random.fold_in, (0, None))(lazy.key.reshape(-1), site)
    return dataclasses.replace(lazy, key=keys.reshape(lazy.key.shape))


def _sharding_of(x: Any, sharding: Any) -> Any:
    """Return the sharding of one argument; where a weight's factors go is left to the compiler."""
    if sharding is None or not is_lazy(x):
        return sharding
    w = None if x.w is None else sharding
    if isinstance(x.w, QuantizedView):
        w = shardings_of(x.w, sharding)
    return dataclasses.replace(x, w=w, **{name: None for name, _ in MEMBERS})


@rule(CONTAINERS, "remat2", "remat", "checkpoint")
def _remat(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Apply the model's policy; if it saves products, save the sum in place of both parts."""
    params = eqn.params
    jaxpr, consts = jaxprs.open_jaxpr(params["jaxpr"])
    policy = params["policy"]
    if any(e.primitive.name == "dot_general" and remat.keeps(policy, e) for e in jaxpr.eqns):
        policy = remat.with_sums(policy)
    if params["differentiated"] and params["prevent_cse"]:
        # This is the recomputation in a backward pass. JAX adds the barrier when it lowers the
        # equation; without it the compiler would merge the recomputation with the forward pass.
        args = _add_barrier(ctx, args)

    def call(*args: Any) -> list[Any]:
        # Only a policy looks for marks: without one they would be equations to no purpose.
        with contextlib.nullcontext() if policy is None else ctx.inside_remat():
            return walk(jaxpr, consts, args)

    return jax.checkpoint(call, policy=policy, prevent_cse=params["prevent_cse"])(*args)


@rule(CONTAINERS, "optimization_barrier")
def _optimization_barrier(ctx: Context, eqn: Any, args: Sequence[Any], walk: Walk) -> list[Any]:
    """Put the members of weights behind the barrier too."""
    return _add_barrier(ctx, args)


def _add_barrier(ctx: Context, values: Sequence[Any]) -> list[Any]:
    """Put all values behind one barrier, arrays and members of weights; tangents one by one.

    The tangent of a weight contains one factor's tangent and the other factor itself. JAX treats
    all values that share a barrier with a tangent as tangents, so each gets its own barrier.
    """
    if ctx.in_derivative:
        return jax.tree.map(lax.optimization_barrier, list(values))
    return lax.optimization_barrier(list(values))
