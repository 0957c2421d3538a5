"""`init`: a parameter tree with A and B beside every targeted weight."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import selection
from lora_jax.adapters.selection import Uses
from lora_jax.core.algebra import accumulator, column_norms
from lora_jax.core.config import ALL_LINEAR, LoraConfig
from lora_jax.core.errors import ConfigError, LayoutError, TargetError
from lora_jax.core.paths import (
    flatten_with_paths,
    lookup,
    names_leaf,
    names_module,
    nearest,
    path_key,
    select,
)
from lora_jax.core.weights import Adapted, Layout, LoraWeight, TrainedLeaf, TrainedRows, is_adapted
from lora_jax.engine import layout_inference
from lora_jax.engine.context import Use
from lora_jax.engine.custom_rules import Rule, check_rules
from lora_jax.initializers import STARTS


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
        **{path: train_rows(plan.leaves[path], *rows, config) for path, rows in plan.rows.items()},
    }
    for path, mask in plan.masks.items():
        nodes[path] = selection.restrict(nodes[path], plan.leaves[path], mask)
    return plan.rebuild([nodes.get(path, leaf) for path, leaf in plan.leaves.items()])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a configuration does to a parameter tree, before any factor is made."""

    leaves: Mapping[str, Any]  # every leaf by path, in tree order
    treedef: Any
    layouts: Mapping[str, Layout]  # of the weights to adapt
    whole: Collection[str]  # the paths to train whole, biases among them
    rows: Mapping[str, tuple[tuple[int, ...], Layout]]  # those that train in rows: which, and where
    masks: selection.Masks  # of leaves that stack layers, where not all are adapted

    def rebuild(self, nodes: Sequence[Any]) -> Any:
        """The tree with `nodes` for its leaves."""
        return jax.tree_util.tree_unflatten(self.treedef, nodes)


def make_plan(
    caller: str,
    params: Any,
    config: LoraConfig,
    fn: Callable | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    rules: Mapping[str, Rule] | None,
) -> Plan:
    """Which leaves of `params` get factors, in which layout; raises what `init` raises."""
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{caller}: config must be a LoraConfig, got {type(config).__name__}")
    if fn is not None and not callable(fn):
        raise ConfigError(
            f"{caller}: the function comes before its arguments, got {type(fn).__name__} in its "
            "place"
        )
    check_rules(rules)
    leaves, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    already = [path for path, leaf in leaves.items() if is_adapted(leaf)]
    if already:
        raise TargetError(
            "already adapted: " + ", ".join(already) + "; merge(params) first, or "
            "split(params) and start from the base"
        )
    uses = None if fn is None else layout_inference.infer_uses(fn, params, args, kwargs, rules)
    whole = select("train", config.train, leaves)
    rows = selection.select_rows(config, leaves, uses)
    _check_once(whole, rows, "in train and in rows")
    taken = dict.fromkeys(whole, "train") | dict.fromkeys(rows, "rows")
    targets = _targets(config, leaves, uses, taken)
    if not targets and not taken and config.bias != "all":
        raise TargetError("exclude leaves no target, and train names no leaf: nothing would train")
    _check_overrides(config, {**targets, **dict.fromkeys(rows, "rows")})
    _check_leaves({**targets, **dict.fromkeys(whole)}, leaves)
    chosen = _layouts(config, targets, leaves, uses)
    chosen, masks = selection.select_layers(config, targets, chosen, leaves)
    _check_ranks(config, chosen, leaves)
    biases = selection.select_biases(config, chosen, leaves, uses)
    masks |= {bias: masks[kernel] for bias, kernel in biases.items() if kernel in masks}
    return Plan(leaves, treedef, chosen, list(whole | biases), rows, masks)


def _targets(
    config: LoraConfig, leaves: Mapping[str, Any], uses: Uses, taken: Mapping[str, str]
) -> dict[str, str]:
    """The paths to adapt, each with the entry that selected it; `taken` ones train otherwise."""
    excluded = select("exclude", config.exclude, leaves)
    if isinstance(config.targets, str) and config.targets == ALL_LINEAR:
        found = {p: ALL_LINEAR for p, leaf in leaves.items() if _is_linear(p, leaf, uses)}
        if not found:
            raise TargetError("targets: no leaf is contracted with an activation")
        return {p: e for p, e in found.items() if p not in excluded and p not in taken}
    found = select("targets", config.targets, leaves)
    # An entry that names a module stands for the linear weights in it, not for its biases.
    others = {
        path: entry
        for path, entry in found.items()
        if _names_module_only(entry, path) and not _is_linear(path, leaves[path], uses)
    }
    found = {path: entry for path, entry in found.items() if path not in others}
    modules = dict.fromkeys(others.values())
    empty = [e for e in modules if not any(names_module(e, path) for path in found)]
    if empty:
        raise TargetError(
            "\n".join(f"targets: {e!r} names a module without linear weights" for e in empty)
        )
    for field in ("train", "rows"):
        trained = [path for path in taken if taken[path] == field]
        _check_once(found, trained, f"in targets and in {field}")
    return {path: entry for path, entry in found.items() if path not in excluded}


def _check_once(some: Collection[str], others: Collection[str], where: str) -> None:
    both = sorted({*some} & {*others})
    if both:
        raise TargetError(f"{', '.join(both)}: {where}; choose one")


def _names_module_only(entry: str, path: str) -> bool:
    return names_module(entry, path) and not names_leaf(entry, path)


def _is_linear(path: str, leaf: Any, uses: Uses) -> bool:
    if not layout_inference.is_floating(leaf):
        return False
    if uses is not None:
        return layout_inference.is_linear(uses.get(path, ()))
    return path.split("/")[-1] != "embedding" and len(leaf.shape) > 1


def _check_overrides(config: LoraConfig, targets: Mapping[str, str]) -> None:
    """Every key of `overrides` must apply to a target."""
    unused = set(config.overrides)
    for path in targets:
        unused -= {key for key in unused if lookup({key: None}, path)}
    if unused:
        lines = [
            f"overrides: {key!r} matches no adapted weight; {nearest(key, targets)}"
            for key in config.overrides
            if key in unused
        ]
        raise TargetError("\n".join(lines))


def _check_leaves(chosen: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    wrong = [
        f"{path}: {getattr(leaves[path], 'dtype', type(leaves[path]).__name__)} cannot be trained; "
        "only floating arrays can (leave it out with exclude=)"
        for path in chosen
        if not layout_inference.is_floating(leaves[path])
    ]
    if wrong:
        raise TargetError("\n".join(wrong))


def _layouts(
    config: LoraConfig, targets: Mapping[str, str], leaves: Mapping[str, Any], uses: Uses
) -> dict[str, Layout]:
    """The layout of every target: the configuration's, the program's, or the shape's."""
    found: dict[str, Layout] = {}
    problems: list[Exception] = []
    for path in targets:
        shape = leaves[path].shape
        named = config.for_path(path)[2]
        try:
            if named is not None:
                found[path] = _named_layout(path, shape, named)
            elif uses is None or layout_inference.is_opaque(uses.get(path, ())):
                found[path] = layout_inference.layout_from_shape(path, shape)
            else:
                found[path] = _used_layout(path, len(shape), uses.get(path, ()))
        except (LayoutError, TargetError) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("\n".join(str(problem) for problem in problems))
    return found


def _named_layout(path: str, shape: Sequence[int], axes: str) -> Layout:
    if len(axes) != len(shape):
        raise LayoutError(f"{path}: layout {axes!r} does not fit the shape {tuple(shape)}")
    return Layout(axes)


def _used_layout(path: str, ndim: int, uses: Sequence[Use]) -> Layout:
    layout = layout_inference.layout_from_uses(ndim, uses)
    if layout is None:
        raise TargetError(
            f"{path}: never contracted with an activation, so a low-rank update has no meaning; it "
            f"is used by {layout_inference.describe(uses)}. Leave it out with exclude=, train it whole with "
            f'train=, or, if you know better, name its layout: overrides={{"{path}": '
            'Override(layout="io")}'
        )
    return layout


def _check_ranks(
    config: LoraConfig, chosen: Mapping[str, Layout], leaves: Mapping[str, Any]
) -> None:
    problems = []
    for path, layout in chosen.items():
        rank, shape = config.for_path(path)[0], leaves[path].shape
        size = min(layout.fan_in(shape), layout.fan_out(shape))
        if rank > size:
            problems.append(
                f"{path}: rank {rank} is above what the weight {tuple(shape)} can hold, {size}. "
                f'Lower it, overrides={{"{path}": Override(rank={size})}}, or leave the weight out '
                "with exclude=, or train it whole with train="
            )
    if problems:
        raise TargetError("\n".join(problems))


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
    rank, scale, _ = config.for_path(path)
    start = config.init if callable(config.init) else STARTS[config.init]

    def factors(key: jax.Array, w: Any) -> tuple[Any, ...]:
        own = path_key(key, path)
        base, a, b = start(own, w, layout, rank, scale, config.dtype)
        scales = jnp.full(layout.select("b", w.shape), scale, accumulator(config.dtype))
        return base, a, b, scales

    abstract = isinstance(w, jax.ShapeDtypeStruct)
    base, a, b, scales = jax.eval_shape(factors, key, w) if abstract else factors(key, w)
    node = LoraWeight(base, a, b, scales, layout=layout, dropout=float(config.dropout))
    _check_start(node, w, rank, config.dtype)
    node = dataclasses.replace(node, w=_placed_as(w, base))
    return _with_magnitude(node, config.dtype) if config.dora else node


def _check_start(node: LoraWeight, w: Any, rank: int, dtype: Any) -> None:
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


def _with_magnitude(node: LoraWeight, dtype: Any) -> LoraWeight:
    def norms(node: LoraWeight) -> jax.Array:
        return column_norms(node).astype(dtype)

    abstract = isinstance(node.w, jax.ShapeDtypeStruct)
    return dataclasses.replace(
        node, magnitude=jax.eval_shape(norms, node) if abstract else norms(node)
    )


def train_whole(w: Any, config: LoraConfig) -> TrainedLeaf:
    """The node of a leaf that trains whole, its value at the start `w` itself."""

    def start(w: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.array(w, config.dtype), jnp.ones((), accumulator(config.dtype))

    abstract = isinstance(w, jax.ShapeDtypeStruct)
    value, scale = jax.eval_shape(start, w) if abstract else start(w)
    return TrainedLeaf(w, value, scale)


def train_rows(w: Any, rows: tuple[int, ...], layout: Layout, config: LoraConfig) -> TrainedRows:
    """The node of a weight that trains in some rows, their values at the start those of `w`."""

    def start(w: Any) -> tuple[jax.Array, jax.Array]:
        whole = TrainedRows(w, None, None, rows=rows, layout=layout)
        return whole.select(w).astype(config.dtype), jnp.ones((), accumulator(config.dtype))

    abstract = isinstance(w, jax.ShapeDtypeStruct)
    value, scale = jax.eval_shape(start, w) if abstract else start(w)
    return TrainedRows(w, value, scale, rows=rows, layout=layout)
