"""`lora(fn)`: make a JAX function accept `LoraWeight`s anywhere in its arguments."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.core.algebra import dense
from lora_jax.core.errors import ConfigError
from lora_jax.core.quantized.coding import check_kind, coding_of
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.slots import pick_slot
from lora_jax.core.weights import (
    LoraWeight,
    TrainedLeaf,
    TrainedRows,
    is_adapted,
    is_weight,
    require_whole,
)
from lora_jax.engine.context import POLICIES, Context
from lora_jax.engine.custom_rules import Rule, check_rules
from lora_jax.engine.forms import Forms
from lora_jax.engine.frozen import frozen
from lora_jax.engine.lazy_weight import LazyWeight, Row, is_lazy
from lora_jax.engine.program import Argument, Program, adapted_arguments
from lora_jax.engine.quantized.merge_aware import trained_leaf
from lora_jax.engine.quantized.view import Served
from lora_jax.engine.rows.batch import Batch
from lora_jax.engine.rows.places import Places
from lora_jax.engine.undropped import Say, say_once, watch


def lora(
    fn: Callable,
    *,
    on_dense: str = "warn",
    rules: Mapping[str, Rule] | None = None,
    forms: Forms | None = None,
    merge_aware: bool | str = False,
    adapters_of: Any = None,
    row_axes: Mapping[int | str, Any] | None = None,
) -> Callable:
    """Transform `fn` so that it accepts adapted parameters.

    The transformed function traces `fn` with the shapes of the base weights and interprets the
    program. Wherever an adapted weight is contracted, it computes `x·W + (x·A)·(scale·B)` and
    leaves `W` as it is (https://arxiv.org/abs/2106.09685, section 4.1). The model does not change.
    In every argument that contains an adapted weight, gradients stop at the frozen leaves; they
    flow to A, B, the fully trained leaves, and to the other arguments. A gradient through weights
    that have a dropout rate but no key, see `with_dropout`, warns once.

    Args:
      fn: any function that JAX can trace. Arrays among its arguments are traced; other arguments
        (`train=True`, `method=...`) and outputs pass through unchanged.
      on_dense: what to do where a weight is used in a way that no rule covers (an elementwise mask,
        an opaque kernel), so that `W + scale·A·B` must be materialized: "warn" once per call site,
        "error", or "allow".
      rules: user-defined rules for custom primitives, by primitive name; see `Rule`.
      forms: which of several equivalent forms of the branch to compute; None takes what is fast
        where the arguments lie, `Forms.for_arrays`.
      merge_aware: train what is served after `merge(params, requantize=...)`: wherever an adapted
        weight has a quantized base, compute `x·Q(W + scale·A·B)`, with Q the rounding of that
        merge, and let gradients go straight through Q. True rounds to the kind of each base, the
        name of a kind to that one. Weights whose base is not quantized are as without it.
        Dropout is refused, because what is served has none.
      adapters_of: for parameters with a stack of adapters, see `stack`: the slot of each row of the
        batch, integers `[rows]`, which may be traced; -1 is the plain base. Every row is computed
        with its own adapter, as if it were alone, and the base product is one for all rows. No
        array of the base's size is made per row.
      row_axes: which axis of an argument's arrays is the axis of rows, by the position or the name
        of the argument, as a tree like the argument or a prefix of it, with None for arrays without
        rows: `{"cache": 1}`. Of other arguments, an array has rows if it has as many along the axis
        that they have in `adapters_of`: axis 0 of `[rows]`, axis 1 of `[1, rows]`.

    Returns:
      A function with `fn`'s signature. Wrap it in `jax.jit`: every call traces `fn` again.

    Raises:
      ConfigError: `on_dense` is not one of the three, or `rules` contains something else; or
        `merge_aware` meets no quantized base, one that cannot be rounded so, or dropout; or
        `adapters_of` does not fit the batch or the stack, or the function mixes rows.
      DenseError: a weight would be materialized and `on_dense` is "error".
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
        raise ConfigError(f"lora: pass a function first, got {type(fn).__name__}")
    if on_dense not in POLICIES:
        raise ConfigError(f"on_dense must be one of {POLICIES}, got {on_dense!r}")
    check_rules(rules)
    check_kind("lora", "merge_aware", merge_aware)
    say = say_once()

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        adapted = adapted_arguments(args, kwargs)
        if not adapted:
            return fn(*args, **kwargs)
        chosen = forms or Forms.for_arrays((args, kwargs))

        if merge_aware:
            _require_quantized((args, kwargs))

        def run(
            row: Row | None,
            args: Any,
            kwargs: Mapping[str, Any],
            places_in: Callable[[Any], Places] = lambda _: {},
        ) -> Any:
            gains: list[Any] = [None]  # of the weights so far

            def enter(argument: Argument, path: str, leaf: Any) -> Any:
                if argument not in adapted:
                    return leaf
                merged = _enter_merged(path, leaf, chosen, merge_aware)
                if merged is not None:
                    return merged
                entered = _enter(path, leaf, chosen, say, gains[-1], row)
                gains.append(
                    entered.gain if is_lazy(entered) and entered.gain is not None else gains[-1]
                )
                return entered

            program = Program.of(fn, args, kwargs, enter)
            places = places_in(program.jaxpr)
            maps_rows = row is not None and not row.slot.ndim
            ctx = Context(on_dense, rules=rules, forms=chosen, places=places, maps_rows=maps_rows)
            return program.evaluate(ctx)

        if adapters_of is None:
            return run(None, args, kwargs)
        batch = Batch.of(args, kwargs, adapted, adapters_of, row_axes)
        return batch.run(fn, run, _enter_base)

    return wrapped


def _enter_base(argument: Argument, path: str, leaf: Any) -> Any:
    """Return what stands in the program for a leaf where only shapes matter: the base."""
    w = leaf.w if is_adapted(leaf) else leaf
    return jax.ShapeDtypeStruct(w.shape, w.dtype) if is_quantized(w) else w


def _enter(path: str, leaf: Any, forms: Forms, say: Say, last_gain: Any, row: Row | None) -> Any:
    """Return what stands in the program for a leaf of an argument that contains adapted weights."""
    if is_adapted(leaf):
        require_whole(path, leaf, stacked=row is not None)
        if row is not None and leaf.slots is not None and not isinstance(leaf, LoraWeight):
            leaf = pick_slot(leaf, row.slot)
    if isinstance(leaf, LoraWeight):
        return LazyWeight.of(watch(leaf, path, say), path, forms.rank_first, last_gain, row)
    if isinstance(leaf, TrainedRows):
        return LazyWeight.of_rows(leaf, path)
    if isinstance(leaf, TrainedLeaf):
        return dense(TrainedLeaf(frozen(leaf.w), leaf.value, frozen(leaf.scale)))
    if is_quantized(leaf):
        return LazyWeight.of_quantized(leaf, path)
    # Gradients stop inside the program: no dW is formed, and a global norm for clipping has none.
    return frozen(leaf) if isinstance(leaf, jax.Array) else leaf


def _enter_merged(path: str, leaf: Any, forms: Forms, kind: bool | str) -> Any:
    """Return what stands for a leaf that is requantized with its adapter; None for others."""
    if not kind or not is_adapted(leaf) or not is_quantized(leaf.w):
        return None
    require_whole(path, leaf)
    try:
        coding = coding_of(leaf.w, kind, "leave merge_aware out")
    except ConfigError as error:
        raise ConfigError(f"merge_aware: {path}: {error}") from None
    if isinstance(leaf, TrainedLeaf):
        return trained_leaf(leaf, coding)
    if getattr(leaf, "key", None) is not None:
        raise ConfigError(
            f"merge_aware: {path} has dropout, and the merged weight that is served has none. Set "
            "dropout=0 in the configuration, or leave with_dropout out of the loss"
        )
    lazy = (
        LazyWeight.of(leaf, path, forms.rank_first)
        if isinstance(leaf, LoraWeight)
        else LazyWeight.of_rows(leaf, path)
    )
    own = None if coding.kind == leaf.w.kind else coding.kind
    return dataclasses.replace(lazy, served=Served(own, leaf.w.shape[leaf.w.axis], leaf.w.block))


def _require_quantized(arguments: Any) -> None:
    """Raise if there are adapters, and the base of none of them is quantized."""
    nodes = [x for x in jax.tree.leaves(arguments, is_leaf=is_weight) if is_adapted(x)]
    if nodes and not any(is_quantized(node.w) for node in nodes):
        raise ConfigError(
            "merge_aware: no adapted weight has a quantized base, so nothing would be rounded. "
            'Quantize the base first, params = lora_jax.quantize(params, "nf4", ...), or leave '
            "merge_aware out"
        )
