"""`transform`: optimizers that know A from B, for `nnx.Optimizer`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.kept_shardings import TRAINED_FIELDS
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weights import Adapted
from lora_jax.frameworks.nnx.adapted import Adapted as Model
from lora_jax.frameworks.nnx.variables import nodes_in


def transform(
    model: Model, make: Callable[[Any], optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer of adapters, such as `lora.lora_plus`, for `nnx.Optimizer`.

    Ordinary optimizers of optax do not need it: every `nnx.Param` of the model is an array that
    trains. Those of `lora_jax` look at A and B together, or treat them differently.

    Args:
      model: the adapted model.
      make: makes the optimizer from an overlay of adapters:
        `lambda adapters: lora.lora_plus(1e-3, adapters)`.

    Returns:
      A transformation for `nnx.Optimizer(model, ..., wrt=nnx.Param)`.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, lora_jax as lora
    >>> x = jnp.ones((2, 4))
    >>> tuned = lora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), lora.LoraConfig(rank=1), x)
    >>> tx = transform(tuned, lambda adapters: lora.lora_plus(1e-2, adapters))
    >>> opt = nnx.Optimizer(tuned, tx, wrt=nnx.Param)
    """
    own = nodes_in(model.adapters)
    tx = optax.with_extra_args_support(make(own))

    def overlay(tree: Any, fill: Callable[[Any], Any]) -> dict[str, Adapted]:
        """Return adapters whose arrays that train are those of a state of the model."""
        arrays, _ = flatten_with_paths(tree)
        return {
            path: dataclasses.replace(
                jax.tree.map(fill, node),
                **{name: arrays[_path(path, name)] for name in _trained(node)},
            )
            for path, node in own.items()
        }

    def init(params: Any) -> Any:
        return tx.init(overlay(params, lambda x: x))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        given = None if params is None else overlay(params, lambda x: x)
        new, state = tx.update(overlay(updates, jnp.zeros_like), state, given, **extra)
        arrays = {
            _path(path, name): getattr(node, name)
            for path, node in new.items()
            for name in _trained(node)
        }
        paths, treedef = flatten_with_paths(updates)
        return jax.tree.unflatten(treedef, [arrays[path] for path in paths]), state

    return optax.GradientTransformationExtraArgs(init, update)


def _trained(node: Adapted) -> list[str]:
    return [name for name in TRAINED_FIELDS if getattr(node, name, None) is not None]


def _path(path: str, name: str) -> str:
    """Return the path of an array in the state of the model."""
    return f"adapters/{path}/{name}"
