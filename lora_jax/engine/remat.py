"""Rematerialisation policies that know what an adapted product needs in the backward pass."""

from collections.abc import Callable
from typing import Any

import jax

#: `jax.ad_checkpoint.checkpoint_name` of the sum `x·W + (x·A)·(scale·B)`.
SUM = "lora_jax.sum"

Policy = Callable[..., Any]

_sums = jax.checkpoint_policies.save_only_these_names(SUM)


def save_sums(prim: Any, *avals: Any, **params: Any) -> Any:
    """A `jax.checkpoint` policy: products without batch axes, of an adapted one only the sum.

    `jax.checkpoint_policies.dots_with_no_batch_dims_saveable` keeps every product, so of an adapted
    one both `x·W` and `(x·A)·(scale·B)`, as large as each other. Their sum is all that the backward
    pass needs, besides the small `x·A`, and with this policy JAX keeps no more. Nothing is computed
    that the other would not compute; without adapters the two are the same. It is for a
    `jax.checkpoint` in the function that `lora` is given; around `lora(fn)` it finds no sums.

    Args:
      prim: the primitive of an equation; JAX passes it, as all the rest.
      *avals: the types of its inputs.
      **params: its parameters.

    Returns:
      Whether the equation's outputs may be kept for the backward pass.

    >>> import jax, jax.numpy as jnp
    >>> block = jax.checkpoint(lambda w, x: jnp.sin(x @ w), policy=save_sums)
    >>> jax.grad(lambda x: block(jnp.ones((1, 1)), x).sum())(jnp.zeros((1, 1)))
    Array([[1.]], dtype=float32)
    """
    return _with_sums(prim, *avals, **params)


def with_sums(policy: Policy) -> Policy:
    """`policy`, and the sums of adapted products too.

    For a policy that keeps products: the sum takes the place of the two that make it.
    """
    return jax.checkpoint_policies.save_from_both_policies(policy, _sums)


def keeps(policy: Policy | None, eqn: Any) -> bool:
    """Whether a policy keeps the output of an equation."""
    avals = [atom.aval for atom in eqn.invars]
    return policy is not None and bool(policy(eqn.primitive, *avals, **eqn.params))


_with_sums: Any = with_sums(jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
