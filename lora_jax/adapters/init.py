"""`init`: a parameter tree with A and B beside every targeted weight."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.plan import Plan, make_plan
from lora_jax.adapters.selection import ChosenRows
from lora_jax.core.abstract import on_shapes
from lora_jax.core.config import LoraConfig
from lora_jax.core.dora import column_norms
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import ConfigError
from lora_jax.core.layout import Layout
from lora_jax.core.paths import path_key
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows, restrict
from lora_jax.engine.custom_rules import Rule
from lora_jax.initializers import INITIALIZERS


def init(
    key: jax.Array,
    params: Any,
    config: LoraConfig,
    fn: Callable | None = None,
    *args: Any,
    rules: Mapping[str, Rule] | None = None,
    **kwargs: Any,
) -> Any:
    """Put a `LoraWeight` where each targeted kernel stands; the function starts unchanged.

    `W` becomes `W + scale · A · B` (https://arxiv.org/abs/2106.09685). Which axes are in and out is
    read from the program `fn(params, *args, **kwargs)`, traced on shapes alone.

    How A and B start is `config.init`, and what that does to the base:

    - "kaiming", "gaussian": one factor is zero, so the update is exactly zero, and outputs are the
      same to the bit unless XLA fuses the two programs differently. The base is the same array.
    - "orthogonal": A·B is zero to rounding. The base is the same array.
    - "pissa", "pissa_fast", "olora": the base becomes `W − scale · A · B`, in its own dtype; the
      outputs are the same to rounding. `on_original` makes the trained adapter one for `W`.
    - "loftq": the base becomes a rounded W; outputs are closer to the original than those of the
      rounded weight alone, and not equal.

    Args:
      key: a random key. Each weight's own key is folded from it and the weight's path.
      params: any pytree of arrays or `ShapeDtypeStruct`s; it is `fn`'s first argument.
      config: what to adapt, and how.
      fn: the function that will run on the parameters. Without it only two-axis and 2-D
        convolution kernels can be adapted, for which the shape leaves no choice.
      *args: example arguments after `params`; arrays or `ShapeDtypeStruct`s.
      rules: what `fn` does with weights in primitives of your own, as for `lora`; see `Rule`.
      **kwargs: example keyword arguments.

    Returns:
      The same tree, every other leaf the same object, with a `LoraWeight` for each target, a
      `TrainedLeaf` for each leaf trained whole and `TrainedRows` for each that trains in rows.
      Where a weight is a `ShapeDtypeStruct` its factors are too, and nothing is allocated.

    Raises:
      TargetError: a pattern matches nothing; a target is not floating, is adapted already, is
        never contracted with anything, or is smaller than the rank. All such are listed at once.
      LayoutError: a shape does not decide the layout and no function is given.
      ConfigError: `config` is no `LoraConfig`, `fn` no function, a rule no `Rule`, or the start
        cannot be made: an odd rank for "orthogonal", a scale that is not positive where the start
        divides by it, or a function of yours that returns other shapes.

    >>> import jax, jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> adapted = init(jax.random.key(0), params, LoraConfig(rank=2))
    >>> adapted["dense"]["kernel"].a.shape, adapted["dense"]["kernel"].b.shape
    ((4, 2), (2, 3))
    """
    plan = make_plan("init", params, config, fn, args, kwargs, rules)
    return finish(plan, _adapt_all(key, plan, config), config)


def finish(plan: "Plan", weights: Mapping[str, LoraWeight], config: LoraConfig) -> Any:
    """The adapted tree: these weights in the layers chosen, and all that trains besides."""
    nodes: dict[str, Adapted] = {
        **weights,
        **{path: train_whole(plan.leaves[path], config) for path in plan.whole},
        **{path: train_rows(plan.leaves[path], rows, config) for path, rows in plan.rows.items()},
    }
    for path, mask in plan.masks.items():
        nodes[path] = restrict(nodes[path], plan.leaves[path], mask)
    return plan.rebuild([nodes.get(path, leaf) for path, leaf in plan.leaves.items()])


def _adapt_all(key: jax.Array, plan: Plan, config: LoraConfig) -> dict[str, LoraWeight]:
    """The adapted weights by path; all that no start could be made for are listed at once."""
    nodes: dict[str, LoraWeight] = {}
    problems: list[str] = []
    for path, layout in plan.layouts.items():
        try:
            nodes[path] = _adapt(key, path, plan.leaves[path], layout, config)
        except ConfigError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return nodes


def _adapt(key: jax.Array, path: str, w: Any, layout: Layout, config: LoraConfig) -> LoraWeight:
    chosen = config.for_path(path)
    rank, scale = chosen.rank, chosen.scale
    initializer = config.init if callable(config.init) else INITIALIZERS[config.init]

    def make(key: jax.Array, w: Any) -> LoraWeight:
        base, a, b = initializer(path_key(key, path), w, layout, rank, scale, config.dtype)
        return new_weight(base, a, b, scale, layout, config)

    node = on_shapes(make, key, w)
    _check_initialized(node, w, rank, config.dtype)
    node = dataclasses.replace(node, w=_placed_as(w, node.w))
    if not config.dora:
        return node
    return dataclasses.replace(node, magnitude=on_shapes(_column_norms(config.dtype), node))


def new_weight(
    w: Any, a: jax.Array, b: jax.Array, scale: float, layout: Layout, config: LoraConfig
) -> LoraWeight:
    """Return the adapted weight of these factors, every layer of a stack at the same scale."""
    batch = a.shape[: layout.axes.count("b")]
    scales = jnp.full(batch, scale, accumulator(config.dtype))
    layout = dataclasses.replace(layout, lookup_only=False)  # for the initializer alone
    return LoraWeight(w, a, b, scales, layout=layout, dropout=float(config.dropout))


def _check_initialized(node: LoraWeight, w: Any, rank: int, dtype: Any) -> None:
    """Refuse what a start of the user's own made, where it does not fit the weight."""
    shape = tuple(w.shape)
    expected = {
        "w'": (node.w, shape, w.dtype),
        "a": (node.a, node.layout.a_shape(shape, rank), dtype),
        "b": (node.b, node.layout.b_shape(shape, rank), dtype),
    }
    problems = [
        f"{name} is {x.dtype}{list(x.shape)}, expected {dtype}{list(shape)}"
        for name, (x, shape, dtype) in expected.items()
        if (tuple(x.shape), x.dtype) != (shape, dtype)
    ]
    if problems:
        raise ConfigError("the start does not fit the weight: " + ", ".join(problems))


def _placed_as(w: Any, base: Any) -> Any:
    """The base that a start made, where `w` lies: on its devices, sharded alike."""
    if isinstance(w, jax.ShapeDtypeStruct):
        return w
    if base is w or not isinstance(w, jax.Array) or isinstance(w, jax.core.Tracer):
        return base
    base = jnp.asarray(base)
    # `device_put` would also tie to its device an array that may still go to any.
    same = base.sharding.is_equivalent_to(w.sharding, w.ndim)
    return base if same else jax.device_put(base, w.sharding)


def _column_norms(dtype: Any) -> Callable[[LoraWeight], jax.Array]:
    return lambda node: column_norms(node).astype(dtype)


def train_whole(w: Any, config: LoraConfig) -> TrainedLeaf:
    """The node of a leaf that trains whole, its value at the start `w` itself."""

    def start(w: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.array(w, config.dtype), jnp.ones((), accumulator(config.dtype))

    value, scale = on_shapes(start, w)
    return TrainedLeaf(w, value, scale)


def train_rows(w: Any, chosen: ChosenRows, config: LoraConfig) -> TrainedRows:
    """Return the node of a weight of which some rows train, initially as they are in `w`."""
    rows, axis, layout = chosen.rows, chosen.axis, chosen.layout
    node = TrainedRows(w, None, None, rows=rows, axis=axis, layout=layout)

    def initialize(w: Any) -> tuple[jax.Array, jax.Array]:
        return node.select(w).astype(config.dtype), jnp.ones((), accumulator(config.dtype))

    value, scale = on_shapes(initialize, w)
    return dataclasses.replace(node, value=value, scale=scale)
