"""`Plan`: which leaves of a tree a configuration adapts, and with which layouts."""

import dataclasses
import warnings
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
from lora_jax.core.config import ALL_LINEAR, LoraConfig, Override
from lora_jax.core.dtypes import is_floating
from lora_jax.core.errors import ConfigError, LeftOutWarning, TargetError, grouped
from lora_jax.core.layout import Layout
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import lookup, names_leaf, names_module, nearest, select
from lora_jax.core.weights import is_adapted
from lora_jax.engine import layout_inference
from lora_jax.engine.custom_rules import Rule, check_rules
from lora_jax.engine.left_out import matrices_left_out
from lora_jax.engine.uses import Uses


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
    _check_once(whole, rows, "in train and in rows")
    taken = dict.fromkeys(whole, "train") | dict.fromkeys(rows, "rows")
    targets = _select_targets(config, leaves, uses, taken)
    if not targets and not taken and config.bias != "all":
        raise TargetError(
            "nothing would train: exclude leaves no target, and train and rows name no leaf"
        )
    _check_overrides(config, {**targets, **dict.fromkeys(rows, "rows")})
    _check_floating({**targets, **dict.fromkeys(whole)}, leaves)
    layouts = layout_inference.layouts_of(config, targets, leaves, uses)
    layouts, masks = select_layers(config, targets, layouts, leaves)
    config = _with_smaller_ranks(config, layouts, leaves)
    _check_ranks(config, layouts, leaves)
    biases = select_biases(config, layouts, leaves, uses)
    masks |= {bias: masks[kernel] for bias, kernel in biases.items() if kernel in masks}
    return Plan(config, leaves, treedef, layouts, list(whole | biases), rows, masks)


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


def _select_targets(
    config: LoraConfig, leaves: Mapping[str, Any], uses: Uses, taken: Mapping[str, str]
) -> dict[str, str]:
    """Return the paths to adapt, each with the entry of `targets` that selected it.

    Args:
      taken: the paths that train in another way, with the name of the field that says so.
    """
    excluded = select("exclude", config.exclude, leaves)
    if isinstance(config.targets, str) and config.targets == ALL_LINEAR:
        found = {p: ALL_LINEAR for p, leaf in leaves.items() if _is_linear(p, leaf, uses)}
        unwanted = {*excluded, *taken}
        _report_left_out({p: x for p, x in leaves.items() if p not in unwanted}, uses, not found)
        return {p: e for p, e in found.items() if p not in unwanted}
    found = _expand_modules(select("targets", config.targets, leaves), leaves, uses)
    for field in ("train", "rows"):
        trained = [path for path in taken if taken[path] == field]
        _check_once(found, trained, f"in targets and in {field}")
    return {path: entry for path, entry in found.items() if path not in excluded}


def _report_left_out(leaves: Mapping[str, Any], uses: Uses, is_empty: bool) -> None:
    """Warn of the matrices that "all-linear" leaves out although the function uses them.

    Raises:
      TargetError: it finds nothing to adapt; the reasons are in the message.
    """
    if uses is None:
        if is_empty:
            raise TargetError(
                "targets: without the function all-linear selects kernels by their shape and name, "
                "and no leaf is one. Pass init the function and its arguments, or name the targets"
            )
        return
    found = matrices_left_out(leaves, uses)
    reasons = {path: reason for path, (reason, is_surprise) in found.items() if is_surprise}
    shown = [f"{path}: {reason}" for path, reason in (reasons or _reasons(found)).items()]
    if is_empty:
        head = (
            "targets: all-linear finds no weight that meets an activation as it is"
            if reasons
            else "targets: no leaf is contracted with an activation"
        )
        raise TargetError("\n".join([head, *([grouped(shown)] if shown else [])]))
    if reasons:
        some = f"{len(reasons)} matrices" if len(reasons) > 1 else "a matrix"
        more = f"; and {len(shown) - 3} more" if len(shown) > 3 else ""
        warnings.warn(
            f"targets: all-linear leaves out {some} that the function uses ({'; '.join(shown[:3])}"
            f"{more}). Name it in targets= to adapt it, in train= to train all of it, or in "
            "exclude= to leave it out without this warning; summary(params, fn, ...) lists all",
            LeftOutWarning,
            stacklevel=5,
        )


def _reasons(found: Mapping[str, tuple[str, bool]]) -> dict[str, str]:
    return {path: reason for path, (reason, _) in found.items()}


def _expand_modules(
    found: Mapping[str, str], leaves: Mapping[str, Any], uses: Uses
) -> dict[str, str]:
    """Return the selected paths, where an entry that names a module stands for its linear weights.

    Raises:
      TargetError: an entry names a module without linear weights.
    """
    others = {
        path: entry
        for path, entry in found.items()
        if names_module(entry, path)
        and not names_leaf(entry, path)
        and not _is_linear(path, leaves[path], uses)
    }
    kept = {path: entry for path, entry in found.items() if path not in others}
    modules = dict.fromkeys(others.values())
    empty = [e for e in modules if not any(names_module(e, path) for path in kept)]
    if empty:
        raise TargetError(
            "\n".join(f"targets: {e!r} names a module without linear weights" for e in empty)
        )
    return kept


def _is_linear(path: str, leaf: Any, uses: Uses) -> bool:
    if not is_floating(leaf):
        return False
    if uses is not None:
        return layout_inference.is_linear(uses.get(path, ()))
    return path.split("/")[-1] != "embedding" and len(leaf.shape) > 1


def _check_once(some: Collection[str], others: Collection[str], where: str) -> None:
    both = sorted({*some} & {*others})
    if both:
        raise TargetError(f"{', '.join(both)}: {where}; choose one")


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


def _check_floating(chosen: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    wrong = [
        f"{path}: {getattr(leaves[path], 'dtype', type(leaves[path]).__name__)} cannot be trained; "
        "only floating arrays can. Leave it out with exclude="
        for path in chosen
        if not is_floating(leaves[path])
    ]
    if wrong:
        raise TargetError(grouped(wrong, "leaves"))


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
    warnings.warn(
        grouped(problems) + "\nSet the rank with overrides=, or leave weights out with exclude=",
        UserWarning,
        stacklevel=4,
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
