"""What optax computed, applied to adapted parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.kept_shardings import TRAINED_FIELDS
from lora_jax.adapters.partition import only_trained, with_frozen
from lora_jax.core.tree import require_adapted
from lora_jax.core.weights import is_adapted


def apply_updates(params: Any, updates: Any) -> Any:
    """Add optax's updates to A, B and fully trained leaves; all other leaves are the same objects.

    Use it in place of `optax.apply_updates`, which adds a zero to each frozen leaf. Outside of the
    jitted step that computed it (in eager code, or under `optax.MultiSteps`, `apply_if_finite` or a
    second `jit`) that addition can turn -0.0 to 0.0 and subnormal numbers to zero, and an adapter
    file would then refuse the base that it was trained on.

    Args:
      params: a joined tree or an overlay.
      updates: a tree of the same structure, as the `update` of `freeze(tx, params)` returns it.

    Raises:
      StructureError: `params` contains no adapters.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> new = apply_updates(params, jax.tree.map(jnp.ones_like, params))
    >>> new["kernel"].w is params["kernel"].w, float(new["kernel"].b[0, 0])
    (True, 1.0)
    """
    require_adapted("apply_updates", params)

    def one(node: Any, update: Any) -> Any:
        if not is_adapted(node):
            return node
        trained = {
            field: optax.apply_updates(getattr(node, field), getattr(update, field))
            for field in TRAINED_FIELDS
            if getattr(node, field, None) is not None
        }
        return dataclasses.replace(node, **trained)

    return jax.tree.map(one, params, updates, is_leaf=is_adapted)


def schedule_free_eval_params(state: Any, params: Any) -> Any:
    """Return the parameters to evaluate, where `freeze` wraps a schedule-free optimizer.

    It is `optax.contrib.schedule_free_eval_params` (https://arxiv.org/abs/2405.15682) for the
    parameters that train. Frozen leaves are the same objects.

    Args:
      state: the optimizer's state, in which one or more `ScheduleFreeState`s may lie anywhere.
      params: the parameters of the same step.

    Raises:
      StructureError: `params` contains no adapters.
      ValueError: `state` contains no `ScheduleFreeState`.

    >>> import jax, jax.numpy as jnp, lora_jax, optax.contrib
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> tx = lora_jax.freeze(optax.contrib.schedule_free_sgd(1.0), params)
    >>> new = schedule_free_eval_params(tx.init(params), params)
    >>> new["kernel"].w is params["kernel"].w
    True
    """
    from optax import contrib

    require_adapted("schedule_free_eval_params", params)
    is_state = lambda x: isinstance(x, contrib.ScheduleFreeState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    if not found:
        raise ValueError("schedule_free_eval_params: the state contains no ScheduleFreeState")
    for one in found:
        evaluated = contrib.schedule_free_eval_params(one, only_trained(params, one.z))
        params = with_frozen(evaluated, params)
    return params


def value_and_grad_from_state(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `jax.value_and_grad(fn)` that takes what a line search has computed from its state.

    It is `optax.value_and_grad_from_state` for a state of `freeze(optax.lbfgs(), params)`: the line
    search of the last step evaluated the loss and its gradient at these parameters already.

    Args:
      fn: a scalar function of adapted parameters.

    Returns:
      A function `(params, *args, state=...) -> (value, gradients)`; the gradients of frozen leaves
      are zeros.

    Raises:
      ValueError: the state contains no value and gradient.

    >>> import jax, jax.numpy as jnp, lora_jax, optax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
    >>> loss = lambda params: (params["kernel"].b ** 2 + 1).sum()
    >>> state = lora_jax.freeze(optax.lbfgs(), params).init(params)
    >>> value, grads = value_and_grad_from_state(loss)(params, state=state)
    >>> float(value)
    3.0
    """

    def call(params: Any, *args: Any, state: Any, **kwargs: Any) -> tuple[jax.Array, Any]:
        is_search = lambda x: {"value", "grad"} <= set(getattr(x, "_fields", ()))
        found = [x for x in jax.tree.leaves(state, is_leaf=is_search) if is_search(x)]
        if not found:
            raise ValueError(
                "value_and_grad_from_state: the state contains no value and gradient of a line "
                "search; use jax.value_and_grad(fn)"
            )
        value, grad = found[0].value, found[0].grad
        trained = only_trained(params, grad)
        compute = jax.value_and_grad(lambda t: fn(with_frozen(t, params), *args, **kwargs))
        value, grad = jax.lax.cond(
            jnp.isfinite(value), lambda _: (value, grad), lambda t: compute(t), trained
        )
        return value, with_frozen(grad, jax.tree.map(jnp.zeros_like, params))

    return call
