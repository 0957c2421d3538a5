"""`quantize` and `dequantize`: weights as codes and scales, and as floating numbers again."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lora_jax.adapters import flax_bytes
from lora_jax.adapters.block_axis import choose_axis
from lora_jax.adapters.split import join, split
from lora_jax.adapters.targets import check_floating, select_targets
from lora_jax.core.abstract import on_shapes
from lora_jax.core.checks import is_integer
from lora_jax.core.config import ALL_LINEAR, check_pattern
from lora_jax.core.errors import ConfigError, LoraError, TargetError, grouped
from lora_jax.core.layout import Layout
from lora_jax.core.params_argument import params_first
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.patterns import Pattern, compile_regex, lookup, nearest
from lora_jax.core.quantized.kinds import WRITABLE, kind_named
from lora_jax.core.quantized.layerwise import quantize_leaf
from lora_jax.core.quantized.qwix import refuse_qarrays
from lora_jax.core.quantized.weight import QuantizedWeight, dequantize_array, is_quantized
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.placement import put
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight, TrainedRows
from lora_jax.engine.custom_rules import Rule, check_rules
from lora_jax.engine.layout_inference import infer_uses
from lora_jax.engine.uses import Uses

_ADVICE = "Name it in targets= to quantize it, or in exclude= to leave it out without this warning"


def quantize(
    params: Any,
    kind: str | Mapping[str, str],
    fn: Callable | None = None,
    *args: Any,
    targets: Pattern = ALL_LINEAR,
    exclude: Pattern = (),
    axes: Mapping[str, int] | None = None,
    donate: bool = False,
    rules: Mapping[str, Rule] | None = None,
    argnum: int = 0,
    argname: str | None = None,
    **kwargs: Any,
) -> Any:
    """Replace each targeted weight by its codes and scales, a `QuantizedWeight`.

    `lora(fn)` takes the new tree, with and without adapters, and `init` adapts it. Each weight is
    divided into blocks along an in axis, which products sum over: the innermost one that the block
    divides. A table whose rows are looked up is divided along its embed axis, so that rows stay
    whole, also if it is a tied head. Layers and experts that are stacked in one array are
    quantized in turn, so that float32 values exist of one at a time.

    Args:
      params: any pytree of arrays or `ShapeDtypeStruct`s. If it has adapters, its base is quantized
        and the adapters stay as they are.
      kind: a name in `QUANTIZED_KINDS` ("nf4", "int8", ...), or pattern -> name, in which the first
        pattern that matches a target wins.
      fn: the function that will run on the parameters, as for `init`. Without it only weights with
        two axes and 2-D convolution kernels have a known in axis.
      *args: its other example arguments.
      targets: what to quantize: "all-linear" or a pattern, as in `LoraConfig`.
      exclude: what to leave out of it.
      axes: pattern -> axis of the blocks, where neither program nor shape decides it, or to choose
        another one.
      donate: whether to delete each floating weight once its codes are made.
      rules: as for `init`.
      argnum: as for `init`.
      argname: as for `init`.
      **kwargs: example keyword arguments.

    Returns:
      The same tree with a `QuantizedWeight` for each target; all other leaves are the same objects.
      The codes of a weight on a mesh are sharded as it is. A `ShapeDtypeStruct` gives shapes.
      A target that has this kind already stays as it is.

    Raises:
      ConfigError: the kind is unknown, or files alone have it; or blocks do not divide a weight or
        its shards, the codes are not smaller than the weight, or it is not finite. All weights are
        listed at once.
      TargetError: a pattern matches nothing, or a target is not floating, has another kind already,
        or is never contracted with an activation.
      LayoutError: nothing decides which axes are in axes.

    >>> import jax.numpy as jnp
    >>> quantize({"kernel": jnp.ones((128, 3))}, "nf4")
    {'kernel': QuantizedWeight(float32[128,3], nf4, axis=-2)}
    """
    flax_bytes.register()
    if callable(fn):
        fn = params_first("quantize", fn, argnum, argname)
    elif fn is not None:
        raise ConfigError(
            "quantize: the function comes before its arguments, but got "
            f"{type(fn).__name__} in its place"
        )
    check_rules(rules)
    _check_kind(kind)
    if adapted_nodes(params):
        base, adapters = split(params)
        layouts = _layouts(params)
    else:
        base, adapters, layouts = params, None, {}
    leaves, treedef = flatten_with_paths(base)
    uses = None if fn is None else infer_uses(fn, base, args, kwargs, rules)
    targets, exclude = check_pattern("targets", targets), check_pattern("exclude", exclude)
    chosen = select_targets(targets, exclude, leaves, uses, advice=_ADVICE)
    refuse_qarrays("quantize", params, chosen)
    kinds = _kinds_of(kind, chosen, leaves)
    check_floating(kinds, leaves, "quantized")
    found = _axes_of(kinds, leaves, uses, layouts, _check_axes(axes, leaves))
    made = _quantize_all(kinds, found, leaves, donate)
    base = jax.tree_util.tree_unflatten(treedef, [made.get(p, x) for p, x in leaves.items()])
    return base if adapters is None else join(base, adapters)


def dequantize(params: Any) -> Any:
    """Replace each `QuantizedWeight` by the floating array that it stands for.

    Each has the dtype of the weight that was quantized, and is sharded as its codes are. All other
    leaves are the same objects, adapters too: `merge` adds those.

    >>> import jax.numpy as jnp
    >>> params = quantize({"kernel": jnp.ones((128, 3))}, "nf4")
    >>> dequantize(params)["kernel"].shape
    (128, 3)
    """

    def one(x: Any) -> Any:
        if not is_quantized(x):
            return x
        made, sharding = on_shapes(_dequantize, x), named_sharding(x)
        if sharding is None or not isinstance(made, jax.ShapeDtypeStruct):
            return made
        return put(made, sharding)

    return jax.tree.map(one, params, is_leaf=is_quantized)


_dequantize = jax.jit(dequantize_array)


def _check_kind(kind: Any) -> None:
    named = list(kind.values()) if isinstance(kind, Mapping) else [kind]
    for name in named:
        if kind_named(name).encode is None:
            raise ConfigError(
                f"quantize: {name} can be read from files, but not written; "
                f"choose one of {', '.join(WRITABLE)}"
            )
    if isinstance(kind, Mapping):
        for pattern in kind:
            compile_regex("kind", pattern)


def _layouts(params: Any) -> dict[str, Layout]:
    """Return the layouts that adapters know of their weights."""
    nodes = adapted_nodes(params)
    return {p: n.layout for p, n in nodes.items() if isinstance(n, LoraWeight | TrainedRows)}


def _kinds_of(kind: Any, chosen: Mapping[str, str], leaves: Mapping[str, Any]) -> dict[str, str]:
    """Return the kind of each target, without those that have it already."""
    if isinstance(kind, Mapping):
        matches = {path: lookup(kind, path, "kind") for path in chosen}
        problems = [
            f"{path}: no pattern in kind matches it. Add one, or leave it out with exclude="
            for path, match in matches.items()
            if match is None
        ]
        used = {match[0] for match in matches.values() if match}
        problems += [
            f"kind: {pattern!r} applies to no target; {nearest(pattern, chosen)}"
            for pattern in kind
            if pattern not in used and not any(lookup({pattern: 0}, path) for path in chosen)
        ]
        if problems:
            raise TargetError(grouped(problems))
        kinds = {path: match[1] for path, match in matches.items() if match}
    else:
        kinds = dict.fromkeys(chosen, kind)
    other = [
        f"{path}: is {leaves[path].kind} already. Call dequantize(params) first, or leave it out "
        "with exclude="
        for path, name in kinds.items()
        if is_quantized(leaves[path]) and leaves[path].kind != name
    ]
    if other:
        raise TargetError(grouped(other))
    return {path: name for path, name in kinds.items() if not is_quantized(leaves[path])}


def _check_axes(axes: Any, leaves: Mapping[str, Any]) -> dict[str, int]:
    """Return the configured axis of each weight that has one."""
    if axes is None:
        return {}
    if not isinstance(axes, Mapping) or not all(map(is_integer, axes.values())):
        raise ConfigError(f"quantize: axes must be a mapping from patterns to axes, got {axes!r}")
    unused = [key for key in axes if not any(lookup({key: 0}, p, "axes") for p in leaves)]
    if unused:
        lines = [f"axes: {key!r} matches no path; {nearest(key, leaves)}" for key in unused]
        raise TargetError("\n".join(lines))
    matches = {path: lookup(axes, path, "axes") for path in leaves}
    return {path: match[1] for path, match in matches.items() if match}


def _axes_of(
    kinds: Mapping[str, str],
    leaves: Mapping[str, Any],
    uses: Uses,
    layouts: Mapping[str, Layout],
    named: Mapping[str, int],
) -> dict[str, int]:
    """Return the axis of the blocks of each target."""
    found: dict[str, int] = {}
    problems: list[LoraError] = []
    for path, kind in kinds.items():
        own = None if uses is None else uses.get(path, ())
        try:
            found[path] = choose_axis(
                path, leaves[path], kind, own, layouts.get(path), named.get(path)
            )
        except LoraError as error:
            problems.append(error)
    if problems:
        raise type(problems[0])(grouped(map(str, problems)))
    return found


def _quantize_all(
    kinds: Mapping[str, str], axes: Mapping[str, int], leaves: Mapping[str, Any], donate: bool
) -> dict[str, QuantizedWeight]:
    """Return the quantized weights by path; an array at several paths is quantized once."""
    made: dict[tuple[int, str, int], tuple[QuantizedWeight, Any]] = {}
    names = {path: (id(leaves[path]), kind, axes[path]) for path, kind in kinds.items()}
    still_needed = Counter(map(id, leaves.values()))
    for path, name in names.items():
        w = leaves[path]
        if name not in made:
            made[name] = quantize_leaf(w, kinds[path], axes[path])
        still_needed[id(w)] -= 1
        if donate and not still_needed[id(w)] and _is_concrete(w):
            w.delete()
    infinite = [
        f"{path}: contains NaN, infinity or numbers too large for {kinds[path]}. Leave it out with "
        "exclude="
        for path, name in names.items()
        if _is_concrete(made[name][1]) and not made[name][1]
    ]
    if infinite:
        raise ConfigError(grouped(infinite))
    return {path: made[name][0] for path, name in names.items()}


def _is_concrete(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
