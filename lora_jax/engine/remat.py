"""Rematerialization policies that know what an adapted product needs in the backward pass."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.engine import jaxprs

#: Marks the sum `x·W + (x·A)·(scale·B)`: the primitive by which a policy finds it.
SUM = jaxprs.identity_primitive("lora_jax.sum")

Policy = Callable[..., Any]


def mark_sum(total: jax.Array) -> jax.Array:
    """Return `total`, marked as the sum of an adapted product."""
    return SUM.bind(total)


def _sums(prim: Any, *_: Any, **__: Any) -> bool:
    return prim is SUM


def save_sums(prim: Any, *avals: Any, **params: Any) -> Any:
    """Save products without batch axes; of an adapted product save only the sum.

    A policy for `jax.checkpoint`. `jax.checkpoint_policies.dots_with_no_batch_dims_saveable` saves
    every product, so for an adapted one both `x·W` and `(x·A)·(scale·B)`, which are equally large.
    The backward pass needs only their sum, besides the small `x·A`, and with this policy JAX saves
    no more than that. It recomputes nothing that the other policy would not; without adapters the
    two are the same. Use it for a `jax.checkpoint` inside the function that `lora` transforms;
    around `lora(fn)` it finds no sums.

    Args:
      prim: the primitive of an equation; JAX passes this and the rest.
      *avals: the types of its inputs.
      **params: its parameters.

    Returns:
      Whether the equation's outputs may be saved for the backward pass.

    >>> import jax, jax.numpy as jnp
    >>> block = jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=save_sums)
    >>> jax.grad(lambda x: block(jnp.ones((1, 1)), x).sum())(jnp.zeros((1, 1)))
    Array([[1.]], dtype=float32)
    """
    return _with_sums(prim, *avals, **params)


def with_sums(policy: Policy) -> Policy:
    """Return `policy` with the sums of adapted products saved too.

    For a policy that saves products: the sum takes the place of its two terms.
    """
    return jax.checkpoint_policies.save_from_both_policies(policy, _sums)


def keeps(policy: Policy | None, eqn: Any) -> bool:
    """Return whether a policy saves the output of an equation."""
    avals = [atom.aval for atom in eqn.invars]
    return policy is not None and bool(policy(eqn.primitive, *avals, **eqn.params))


_with_sums: Any = with_sums(jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
