"""`init`: add A and B to every targeted weight of a parameter tree."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import flax_bytes
from lora_jax.adapters.plan import Plan, make_plan
from lora_jax.adapters.selection import ChosenRows
from lora_jax.core.abstract import on_shapes
from lora_jax.core.config import LoraConfig
from lora_jax.core.dora import column_norms
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import ConfigError, grouped
from lora_jax.core.host_memory import on_device
from lora_jax.core.layout import Layout
from lora_jax.core.params_argument import params_first
from lora_jax.core.paths import path_key
from lora_jax.core.quantized.weight import QuantizedWeight, dequantized, is_quantized
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.placement import Placement, put
from lora_jax.core.sharding.quantized import field_shardings
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
    argnum: int = 0,
    argname: str | None = None,
    fsdp: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Replace each targeted kernel by a `LoraWeight`; the function does not change yet.

    `W` becomes `W + scale · A · B` (https://arxiv.org/abs/2106.09685). To see which axes of each
    weight are in and which are out, `fn(params, *args, **kwargs)` is traced on shapes alone.

    `config.init` says how A and B are initialized, and whether the base changes:

    - "kaiming", "gaussian": one factor is zero, so the update is exactly zero and the outputs are
      the same to the bit, unless XLA fuses the two programs differently. The base stays the same
      array.
    - "orthogonal": A·B is zero up to rounding. The base stays the same array.
    - "pissa", "pissa_fast", "olora": the base becomes `W − scale · A · B` in its own dtype, and the
      outputs are the same up to rounding. `on_original` turns the trained adapter into one for `W`.
    - "loftq": the base becomes a rounded W. The outputs are closer to the original than with the
      rounded weight alone, but not equal.

    The last four decompose each weight. One that is sharded along explicit mesh axes is gathered
    for that, and its base keeps the sharding.

    On a mesh every array that trains is sharded as its weight is: A along the in axes, B and the
    magnitude along the out axes, all along the axis of experts, but not along the mesh axes that
    shard the examples (FSDP), see `fsdp`. So a step pays for no communication beyond that of the
    frozen model but the sum of the gradients. See `shardings` for the tree of them. Under `jax.jit`
    only shardings along explicit axes are known: pass `out_shardings=shardings(...)` to it there.

    Args:
      key: a random key. The key of each weight is folded from it and the weight's path.
      params: any pytree of arrays or `ShapeDtypeStruct`s; an argument of `fn`, see `argnum`.
      config: what to adapt, and how.
      fn: the function that will run on the parameters. Without it only kernels with two axes and
        2-D convolution kernels can be adapted, because their shape leaves no choice.
      *args: the other example arguments, in their order; arrays or `ShapeDtypeStruct`s.
      rules: what custom primitives in `fn` do with weights, as for `lora`; see `Rule`.
      argnum: the position of the parameters among the arguments of `fn`, if they are not first.
      argname: the name of the keyword argument that they are, in place of `argnum`.
      fsdp: the names of the mesh axes that shard weights only to save memory. None means those that
        shard the first sharded axis of an array in `args` or `kwargs`, and those called `data`,
        `fsdp`, `dp`, `ddp`, `batch` or `replica`, also as a part, as in `dcn_data`. Experts stay
        sharded along an axis that shards the batch too, unless it has such a name.
      **kwargs: example keyword arguments.

    Returns:
      The same tree with a `LoraWeight` for each target, a `TrainedLeaf` for each fully trained leaf
      and a `TrainedRows` for each weight of which some rows train. All other leaves are the same
      objects. The factors of a `ShapeDtypeStruct` are `ShapeDtypeStruct`s; nothing is allocated.

    Raises:
      TargetError: a pattern matches nothing, or a target is not floating, is adapted already, is
        never contracted with an activation, or is smaller than the rank. All are listed at once.
      LayoutError: the shape of a weight does not decide its layout, and no function is given.
      ConfigError: `config` is not a `LoraConfig`, `fn` not a function or a rule not a `Rule`; or a
        weight cannot be initialized: "orthogonal" needs an even rank, initializers that divide by
        the scale a positive one, and a custom initializer must return the expected shapes. Or
        `fsdp` names no axis of the base's mesh, or the example arguments do not agree on the axes.

    >>> import jax, jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    >>> adapted = init(jax.random.key(0), params, LoraConfig(rank=2))
    >>> adapted["dense"]["kernel"].a.shape, adapted["dense"]["kernel"].b.shape
    ((4, 2), (2, 3))
    """
    if callable(fn):
        fn = params_first("init", fn, argnum, argname)
    plan = make_plan("init", params, config, fn, args, kwargs, rules)
    return init_planned(key, plan, Placement.of("init", plan.leaves.values(), fsdp, (args, kwargs)))


def init_planned(key: jax.Array, plan: Plan, placement: Placement) -> Any:
    """Return the adapted tree of a plan, with what trains where `placement` says."""
    return finish(plan, _adapt_all(key, plan, plan.config, placement), plan.config, placement)


def finish(
    plan: Plan, weights: Mapping[str, LoraWeight], config: LoraConfig, placement: Placement
) -> Any:
    """Return the adapted tree: these weights in the chosen layers, and all else that trains."""
    flax_bytes.register()
    nodes: dict[str, Adapted] = {
        **weights,
        **{path: train_whole(plan.leaves[path], config) for path in plan.whole},
        **{path: train_rows(plan.leaves[path], rows, config) for path, rows in plan.rows.items()},
    }
    for path, mask in plan.masks.items():
        nodes[path] = restrict(nodes[path], plan.leaves[path], mask)
    nodes = {path: placement.place(node, plan.leaves[path]) for path, node in nodes.items()}
    return plan.rebuild([nodes.get(path, leaf) for path, leaf in plan.leaves.items()])


def _adapt_all(
    key: jax.Array, plan: Plan, config: LoraConfig, placement: Placement
) -> dict[str, LoraWeight]:
    """Return the adapted weights by path; all that cannot be initialized are listed at once."""
    nodes: dict[str, LoraWeight] = {}
    problems: list[str] = []
    for path, layout in plan.layouts.items():
        try:
            nodes[path] = _adapt(key, path, plan.leaves[path], layout, config, placement)
        except ConfigError as error:
            problems.append(f"{path}: {error}")
    if problems:
        raise ConfigError(grouped(problems))
    return nodes


def _adapt(
    key: jax.Array, path: str, w: Any, layout: Layout, config: LoraConfig, placement: Placement
) -> LoraWeight:
    chosen = config.for_path(path)
    initializer = config.init if callable(config.init) else INITIALIZERS[config.init]

    def initialize(key: jax.Array, w: Any) -> LoraWeight:
        own = path_key(key, path)
        base, a, b = initializer(own, w, layout, chosen.rank, chosen.scale, config.dtype)
        return new_weight(base, a, b, chosen.scale, layout, config)

    node = on_shapes(initialize, key, w)
    _check_initialized(node, w, chosen.rank, config.dtype)
    node = placement.place(dataclasses.replace(node, w=_place_like(w, node.w)), w)
    if not config.dora:
        return node
    norms = on_shapes(lambda node: column_norms(node).astype(config.dtype), node)
    return dataclasses.replace(node, magnitude=norms)


def new_weight(
    w: Any, a: jax.Array, b: jax.Array, scale: float, layout: Layout, config: LoraConfig
) -> LoraWeight:
    """Return the adapted weight of these factors, every layer of a stack at the same scale."""
    batch = a.shape[: layout.axes.count("b")]
    scales = jnp.full(batch, scale, accumulator(config.dtype))
    layout = dataclasses.replace(layout, lookup_only=False)  # for the initializer alone
    return LoraWeight(w, a, b, scales, layout=layout, dropout=float(config.dropout))


def _check_initialized(node: LoraWeight, w: Any, rank: int, dtype: Any) -> None:
    """Raise if what a custom initializer returned does not fit the weight."""
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
        raise ConfigError(
            "the initializer's result does not fit the weight: " + ", ".join(problems)
        )


def _place_like(w: Any, base: Any) -> Any:
    """Return the base that an initializer made, on the devices of `w` and sharded alike."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(w)):
        return w if is_quantized(base) == is_quantized(w) else base
    if base is w or not isinstance(w, jax.Array):
        return base
    if any(isinstance(x, jax.core.Tracer) for x in (w, *jax.tree.leaves(base))):
        return base
    if is_quantized(base):
        return _place_codes(w, base)
    base = jnp.asarray(base)
    # Keep an array that may still go to any device: `device_put` would commit it to one.
    same = base.sharding.is_equivalent_to(w.sharding, w.ndim)
    return base if same else jax.device_put(base, w.sharding)


def _place_codes(w: Any, base: QuantizedWeight) -> QuantizedWeight:
    """Return a base that an initializer quantized, its arrays sharded as `w` is."""
    sharding = named_sharding(w)
    if sharding is None:
        return base
    places = field_shardings(base, sharding)
    fields = {name: put(x, places[name]) for name, x in base.fields.items()}
    return dataclasses.replace(base, fields=fields)


def train_whole(w: Any, config: LoraConfig) -> TrainedLeaf:
    """Return the node of a fully trained leaf, whose initial value is that of `w`."""

    def initialize(w: Any) -> tuple[jax.Array, jax.Array]:
        values = jnp.array(dequantized(on_device(w)), config.dtype)
        return values, jnp.ones((), accumulator(config.dtype))

    value, scale = on_shapes(initialize, w)
    return TrainedLeaf(w, value, scale)


def train_rows(w: Any, chosen: ChosenRows, config: LoraConfig) -> TrainedRows:
    """Return the node of a weight of which some rows train, initially as they are in `w`."""
    rows, axis, layout = chosen.rows, chosen.axis, chosen.layout
    node = TrainedRows(w, None, None, rows=rows, axis=axis, layout=layout)

    def initialize(w: Any) -> tuple[jax.Array, jax.Array]:
        return node.select(w).astype(config.dtype), jnp.ones((), accumulator(config.dtype))

    value, scale = on_shapes(initialize, w)
    return dataclasses.replace(node, value=value, scale=scale)
