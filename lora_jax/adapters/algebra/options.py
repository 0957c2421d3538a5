"""The options of `combine`, checked."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.algebra.methods import MAJORITY_SIGNS, METHODS, MajoritySign, Recipe
from lora_jax.core.checks import is_number, is_size, is_within
from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown_value


def recipe_of(
    method: str,
    density: float | None,
    rank: int | None,
    majority_sign: MajoritySign,
    key: jax.Array | None,
    exact: bool,
    largest_rank: int,
) -> Recipe:
    """Return a method with its options; those of `combine`, and the largest rank of an adapter.

    Raises:
      ConfigError: one is missing, out of range, or not one that the method has.
    """
    if not isinstance(method, str) or method not in METHODS:
        known = ", ".join(METHODS)
        raise ConfigError(f"combine: method must be one of {known}, got {shown_value(method)}")
    row = METHODS[method]
    if row.keeps == "all" and density is not None:
        raise ConfigError(f"combine: method {method!r} keeps all elements; leave density out")
    if row.keeps != "all" and not is_within(density, 0, 1):
        raise ConfigError(
            f"combine: method {method!r} needs density=, the share of elements that stay, from 0 "
            f"to 1, got {shown_value(density)}"
        )
    if row.keeps == "random" and not density:
        raise ConfigError(f"combine: method {method!r} divides by the density: it must not be 0")
    if row.keeps == "random" and density != 1 and key is None:
        raise ConfigError(f"combine: method {method!r} draws at random; pass key=jax.random.key(0)")
    if majority_sign not in MAJORITY_SIGNS:
        raise ConfigError(
            f"combine: majority_sign must be one of {', '.join(MAJORITY_SIGNS)}, got "
            f"{shown_value(majority_sign)}"
        )
    if rank is not None and row.sums != "updates":
        mend = 'take "svd", or call resize on the result'
        raise ConfigError(f"combine: method {method!r} has no rank to choose; {mend}")
    if rank is not None and not is_size(rank):
        raise ConfigError(f"combine: rank must be a positive integer, got {shown_value(rank)}")
    share = 1.0 if density is None else float(density)
    return Recipe(row, share, majority_sign, rank or largest_rank, exact)


def as_weights(weights: Any, count: int) -> np.ndarray | jax.Array:
    """Return one weight per adapter, `[adapters]`, in NumPy unless they are traced.

    Raises:
      ConfigError: they are not as many finite numbers.
    """
    if weights is None:
        return np.ones(count)
    if not hasattr(weights, "shape"):
        given = list(weights) if isinstance(weights, list | tuple) else [weights]
        wrong = [w for w in given if not (hasattr(w, "shape") or _is_finite(w))]
        if wrong:
            raise ConfigError(
                f"combine: weights must be finite numbers, got {shown_value(wrong[0])}"
            )
        traced = any(isinstance(w, jax.core.Tracer) for w in given)
        weights = jnp.stack([*map(jnp.asarray, given)]) if traced else np.array(given, float)
    if weights.shape != (count,):
        raise ConfigError(
            f"combine: weights must be one number per adapter, {count}, got the shape "
            f"{weights.shape}"
        )
    return weights if isinstance(weights, jax.core.Tracer) else np.asarray(weights)


def _is_finite(x: Any) -> bool:
    return is_number(x) and math.isfinite(x)
