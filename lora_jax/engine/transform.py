"""`lora(fn)`: any JAX function, made to accept `LoraWeight`s anywhere in its arguments."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from lora_jax.core.algebra import dense
from lora_jax.core.errors import ConfigError
from lora_jax.core.weights import LoraWeight, TrainedLeaf, TrainedRows, is_adapted, require_whole
from lora_jax.engine.context import POLICIES, Context
from lora_jax.engine.custom_rules import Rule, check_rules
from lora_jax.engine.forms import Forms
from lora_jax.engine.lazy_weight import LazyWeight
from lora_jax.engine.program import Argument, Program, adapted_arguments


def lora(
    fn: Callable,
    *,
    on_dense: str = "warn",
    rules: Mapping[str, Rule] | None = None,
    forms: Forms | None = None,
) -> Callable:
    """`fn`, understanding adapted parameters: a program transformation.

    It traces `fn` with the shapes of the base weights, walks the program, and wherever an adapted
    weight meets a contraction emits `x·W + (x·A)·(scale·B)` in place of touching `W`
    (https://arxiv.org/abs/2106.09685, section 4.1). The model needs no change. In every argument
    that holds an adapted weight gradients stop at the frozen leaves; they flow to A, B, the leaves
    trained whole, and to the other arguments.

    Args:
      fn: any function that JAX can trace. Arrays among its arguments are traced; other arguments
        (`train=True`, `method=...`) and outputs pass through as they are.
      on_dense: what to do where a weight is used in a way that no rule covers (an elementwise mask,
        an opaque kernel), so that `W + scale·A·B` must be made: "warn" once a site, "error", or
        "allow".
      rules: what to do at primitives of your own, by their names; see `Rule`.
      forms: which of several equal forms of the branch to compute; None takes what is measured to
        be fast on the default backend, `Forms.for_backend()`.

    Returns:
      A function with `fn`'s signature. Wrap it in `jax.jit`: each call traces `fn` anew.

    Raises:
      ConfigError: `on_dense` is none of the three, or a rule is no `Rule`.
      DenseError: a weight would be made dense and `on_dense` is "error".
      StructureError: adapters were passed without their base, or do not fit it.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"kernel": jnp.array([[2.0, 4.0], [3.0, 6.0]])}
    >>> def model(params, x):
    ...     return x @ params["kernel"]
    >>> x = jnp.ones((1, 2))
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> adapted = lora_jax.init(jax.random.key(0), params, config, model, x)
    >>> lora_jax.lora(model)(adapted, x)
    Array([[ 5., 10.]], dtype=float32)
    """
    if not callable(fn):
        raise ConfigError(f"lora takes a function, got {type(fn).__name__}")
    if on_dense not in POLICIES:
        raise ConfigError(f"on_dense must be one of {POLICIES}, got {on_dense!r}")
    check_rules(rules)

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        adapted = adapted_arguments(args, kwargs)
        if not adapted:
            return fn(*args, **kwargs)
        chosen = forms or Forms.for_backend()

        def enter(argument: Argument, path: str, leaf: Any) -> Any:
            return _enter(path, leaf, chosen) if argument in adapted else leaf

        ctx = Context(on_dense, rules=rules, forms=chosen)
        return Program.of(fn, args, kwargs, enter).evaluate(ctx)

    return wrapped


def _enter(path: str, leaf: Any, forms: Forms) -> Any:
    """What stands in the program for a leaf of an argument that holds adapted weights."""
    if is_adapted(leaf):
        require_whole(path, leaf)
    if isinstance(leaf, LoraWeight):
        return LazyWeight.of(leaf, path, forms.rank_first)
    if isinstance(leaf, TrainedRows):
        return LazyWeight.of_rows(leaf, path)
    if isinstance(leaf, TrainedLeaf):
        return dense(
            TrainedLeaf(lax.stop_gradient(leaf.w), leaf.value, lax.stop_gradient(leaf.scale))
        )
    # Gradients stop inside the program: no dW is formed, and a clipped global norm counts none.
    return lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf
