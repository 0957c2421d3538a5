"""`Plan`: which leaves of a tree a configuration adapts, and with which layouts."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from lora_jax.adapters.selection import (
    ChosenRows,
    Masks,
    select_biases,
    select_layers,
    select_rows,
)
from lora_jax.adapters.targets import check_floating, check_once, select_targets
from lora_jax.core.config import ALL_LINEAR, LoraConfig, Override
from lora_jax.core.errors import ConfigError, TargetError, grouped, warn_user
from lora_jax.core.layout import Layout
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import lookup, nearest, select
from lora_jax.core.quantized.qwix import refuse_qarrays
from lora_jax.core.weights import is_adapted
from lora_jax.engine import layout_inference
from lora_jax.engine.custom_rules import Rule, check_rules


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a configuration does to a parameter tree, before any factor is made."""

    config: LoraConfig  # with the ranks of weights that are too small for the configured one
    leaves: Mapping[str, Any]  # every leaf by path, in tree order
    treedef: Any
    layouts: Mapping[str, Layout]  # of the weights to adapt
    whole: Collection[str]  # the paths of fully trained leaves, biases among them
    rows: Mapping[str, ChosenRows]  # of the weights of which some rows train
    masks: Masks  # of leaves that stack layers, if not all layers are adapted

    def rebuild(self, nodes: Sequence[Any]) -> Any:
        """Return the tree with `nodes` as its leaves."""
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
    """Decide which leaves of `params` train, and how; raises what `init` raises."""
    _check_arguments(caller, config, fn, rules)
    leaves, treedef = flatten_with_paths(params, is_leaf=is_adapted)
    _check_plain(leaves)
    uses = None if fn is None else layout_inference.infer_uses(fn, params, args, kwargs, rules)
    whole = select("train", config.train, leaves)
    rows = select_rows(config, leaves, uses)
    check_once(whole, rows, "in train and in rows")
    taken = dict.fromkeys(whole, "train") | dict.fromkeys(rows, "rows")
    targets = select_targets(config.targets, config.exclude, leaves, uses, taken)
    if not targets and not taken and config.bias != "all":
        raise TargetError(
            "nothing would train: exclude leaves no target, and train and rows name no leaf"
        )
    _check_overrides(config, {**targets, **dict.fromkeys(rows, "rows")})
    refuse_qarrays(caller, params, {**targets, **taken})
    check_floating({**targets, **dict.fromkeys(whole)}, leaves, "trained")
    layouts = layout_inference.layouts_of(config, targets, leaves, uses)
    layouts, masks = select_layers(config, targets, layouts, leaves)
    config = _with_possible_ranks(config, layouts, leaves)
    biases = select_biases(config, layouts, leaves, uses)
    masks |= {bias: masks[kernel] for bias, kernel in biases.items() if kernel in masks}
    return Plan(config, leaves, treedef, layouts, list(whole | biases), rows, masks)


def planned_again(plan: Plan, config: LoraConfig) -> Plan:
    """Return a plan that adapts the same weights with another rank, scale, initializer or kind."""
    return dataclasses.replace(plan, config=_with_possible_ranks(config, plan.layouts, plan.leaves))


def _check_arguments(caller: str, config: Any, fn: Any, rules: Mapping[str, Rule] | None) -> None:
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"{caller}: config must be a LoraConfig, got {type(config).__name__}")
    if fn is not None and not callable(fn):
        raise ConfigError(
            f"{caller}: the function comes before its arguments, but got {type(fn).__name__} in "
            "its place"
        )
    check_rules(rules)


def _check_plain(leaves: Mapping[str, Any]) -> None:
    already = [path for path, leaf in leaves.items() if is_adapted(leaf)]
    if already:
        raise TargetError(
            f"already adapted: {', '.join(already)}. Call merge(params) first, or "
            "start from the base that split(params) returns"
        )


def _check_overrides(config: LoraConfig, targets: Mapping[str, str]) -> None:
    """Raise unless every key of `overrides` applies to a target."""
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


def _with_possible_ranks(
    config: LoraConfig, layouts: Mapping[str, Layout], leaves: Mapping[str, Any]
) -> LoraConfig:
    """Return the configuration with ranks that the weights can hold, or raise."""
    config = _with_smaller_ranks(config, layouts, leaves)
    _check_ranks(config, layouts, leaves)
    return config


def _with_smaller_ranks(
    config: LoraConfig, layouts: Mapping[str, Layout], leaves: Mapping[str, Any]
) -> LoraConfig:
    """Return the configuration with the largest possible rank for weights too small for it.

    Only "all-linear" may name a weight without meaning it, such as the head of a few classes.
    Weights whose rank an override sets keep it, and so does a rank that no weight can hold.
    """
    sizes = {path: _largest_rank(layout, leaves[path].shape) for path, layout in layouts.items()}
    largest = max(sizes.values(), default=0)
    if config.targets != ALL_LINEAR or largest < config.rank:
        return config
    step = 2 if config.init == "orthogonal" else 1  # it needs an even rank
    smaller = {}
    for path, size in sizes.items():
        found = lookup(config.overrides, path)
        override = found[1] if found else Override()
        if override.rank is None and size < config.rank and size >= step:
            smaller[path] = dataclasses.replace(override, rank=size - size % step)
    if not smaller:
        return config
    problems = [
        f"{path}: the weight {tuple(leaves[path].shape)} can hold only rank {override.rank}, so it "
        f"gets that in place of {config.rank}"
        for path, override in smaller.items()
    ]
    warn_user(
        grouped(problems) + "\nSet the rank with overrides=, or leave weights out with exclude="
    )
    return dataclasses.replace(config, overrides={**smaller, **config.overrides})


def _largest_rank(layout: Layout, shape: tuple[int, ...]) -> int:
    return min(layout.fan_in(shape), layout.fan_out(shape))


def _check_ranks(
    config: LoraConfig, layouts: Mapping[str, Layout], leaves: Mapping[str, Any]
) -> None:
    problems = []
    for path, layout in layouts.items():
        rank, shape = config.for_path(path).rank, leaves[path].shape
        size = _largest_rank(layout, shape)
        if rank > size:
            problems.append(
                f"{path}: rank {rank} is above what the weight {tuple(shape)} can hold, {size}. "
                f'Lower it, overrides={{"{path}": Override(rank={size})}}, '
                "leave the weight out with exclude=, or train it fully with train="
            )
    if problems:
        raise TargetError(grouped(problems))
