"""`extract`: turn a full fine-tune into the base and the best adapter of a given rank."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.init import new_weight, train_rows, train_whole
from lora_jax.adapters.plan import Plan, make_plan
from lora_jax.core import weights
from lora_jax.core.abstract import on_shapes
from lora_jax.core.algebra import dense
from lora_jax.core.config import LoraConfig
from lora_jax.core.dtypes import accumulator, round_to
from lora_jax.core.errors import ConfigError, StructureError, grouped
from lora_jax.core.layout import Layout
from lora_jax.core.linalg import balanced, matmul, randomized_svd, truncated_svd
from lora_jax.core.matrices import as_factors, map_matrices
from lora_jax.core.params_argument import params_first
from lora_jax.core.paths import flatten_with_paths, path_key
from lora_jax.core.quantized.weight import dequantized
from lora_jax.core.sharding.placement import Placement
from lora_jax.core.weights import Adapted, is_adapted
from lora_jax.engine.custom_rules import Rule


def extract(
    base: Any,
    tuned: Any,
    config: LoraConfig | int,
    fn: Callable | None = None,
    *args: Any,
    exact: bool = False,
    rules: Mapping[str, Rule] | None = None,
    argnum: int = 0,
    argname: str | None = None,
    fsdp: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """Compute the low-rank adapter that comes closest to a full fine-tune.

    For each targeted weight, scale·A·B is the truncated SVD of ΔW = tuned − base in float32: no
    other matrix of its rank is closer to ΔW (Eckart and Young, 1936). By default the SVD is
    randomized (https://arxiv.org/abs/0909.4061, with 8 extra columns and two power iterations),
    which is many times faster on large weights and nearly as close. A weight that is sharded along
    explicit mesh axes is gathered for it.

    Args:
      base: the parameters before fine-tuning.
      tuned: the same tree after fine-tuning.
      config: which weights, layers, ranks and scales, as for `init`, or only a rank. Leaves and
        rows that `train`, `bias` and `rows` name are copied from `tuned`. `init` is not used.
      fn: the function of the parameters, from which layouts are inferred as by `init`.
      *args: its other example arguments.
      exact: whether to use the exact SVD.
      rules: as for `init`.
      argnum: the position of the parameters among the arguments of `fn`, as for `init`.
      argname: their name, as for `init`.
      fsdp: as for `init`; the adapters are placed as `init` places them.
      **kwargs: example keyword arguments.

    Returns:
      (overlay, residuals): the overlay for `join(base, overlay)`, and for every array of the tree,
      by path, what the overlay misses: ‖ΔW − scale·A·B‖/‖ΔW‖ as a float. It is 0 if nothing is
      missing or nothing changed, and 1 for a leaf that changed but does not train.

    Raises:
      StructureError: the two trees differ; every difference is listed.
      ConfigError: a scale is not positive.
      TargetError, LayoutError: as `init`.

    >>> import jax.numpy as jnp, lora_jax
    >>> base = {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
    >>> tuned = {"kernel": jnp.array([[2.0, 4, 6], [3, 6, 9], [4, 8, 12]]), "bias": jnp.ones(3)}
    >>> overlay, residuals = extract(base, tuned, 1)
    >>> lora_jax.merge(lora_jax.join(base, overlay))["kernel"].round(4)
    Array([[ 2.,  4.,  6.],
           [ 3.,  6.,  9.],
           [ 4.,  8., 12.]], dtype=float32)
    >>> residuals["kernel"] < 1e-6, residuals["bias"]
    (True, 1.0)
    """
    if isinstance(config, int):
        config = LoraConfig(rank=config)
    if callable(fn):
        fn = params_first("extract", fn, argnum, argname)
    plan = make_plan("extract", base, config, fn, args, kwargs, rules)
    config, pairs = plan.config, _pairs(plan, tuned)
    _check_scales(plan, config)
    if config.dora:
        raise ConfigError("extract: dora=True has no meaning here; leave it out of the config")
    found = {
        path: on_shapes(functools.partial(_extract_leaf, path, plan, config, exact), *pair)
        for path, pair in pairs.items()
    }
    placement = Placement.of("extract", plan.leaves.values(), fsdp, (args, kwargs))
    nodes = {path: placement.place(x, plan.leaves[path]) for path, (x, _) in found.items() if x}
    overlay = plan.rebuild([nodes.get(path) for path in plan.leaves])
    return overlay, {path: _as_float(missed) for path, (_, missed) in found.items()}


Extracted = tuple[Adapted | None, Any]


def _extract_leaf(
    path: str, plan: Plan, config: LoraConfig, exact: bool, before: Any, after: Any
) -> Extracted:
    """Return what the overlay has at `path`, and the part of the change that it misses."""
    mask = plan.masks.get(path)
    if path in plan.layouts:
        chosen, layout = config.for_path(path), plan.layouts[path]
        rank, scale, key = chosen.rank, chosen.scale, path_key(jax.random.key(0), path)
        a, b, lost, total = _best_factors(
            layout, rank, config.dtype, exact, key, before, after, scale
        )
        node = new_weight(None, a, b, scale, layout, config)
        if mask is None:
            return node, _relative(lost.sum(), total.sum())
        missed = _relative(jnp.where(mask, lost, total).sum(), total.sum())
        return weights.restrict(node, None, mask), missed
    if path in plan.whole or path in plan.rows:
        trained = dataclasses.replace(_copy_tuned(path, plan, config, after), w=before)
        got = dense(trained, accumulator(before.dtype, after.dtype))
        after = dequantized(after)
        missed = _relative(_squares(after, got), _squares(after, dequantized(before)))
        return dataclasses.replace(trained, w=None), missed
    return None, jnp.any(dequantized(before) != dequantized(after)).astype(jnp.float32)


def _copy_tuned(path: str, plan: Plan, config: LoraConfig, after: Any) -> Adapted:
    """Return the node of a leaf that trains fully or in rows, with the tuned values."""
    if path in plan.rows:
        return train_rows(after, plan.rows[path], config)
    whole, mask = train_whole(after, config), plan.masks.get(path)
    return whole if mask is None else weights.restrict(whole, after, mask)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _best_factors(
    layout: Layout,
    rank: int,
    dtype: Any,
    exact: bool,
    key: jax.Array,
    before: jax.Array,
    after: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return A and B of one weight, and ‖ΔW − scale·A·B‖² and ‖ΔW‖² of each of its matrices."""

    def one(key: jax.Array, before: jax.Array, after: jax.Array) -> tuple[jax.Array, ...]:
        change = _difference(after, before)
        svd = truncated_svd(change, rank) if exact else randomized_svd(key, change, rank)
        a, b = (round_to(x, dtype) for x in balanced(svd, scale))
        update = scale * matmul(a, b)
        return a.astype(dtype), b.astype(dtype), _squares(change, update), _squares(after, before)

    a, b, lost, total = map_matrices(one, key, layout, before, after)
    return *as_factors(a, b, layout, before.shape), lost, total


def _difference(x: jax.Array, y: jax.Array) -> jax.Array:
    wide = accumulator(x.dtype, y.dtype)
    return x.astype(wide) - y.astype(wide)


def _squares(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return ‖x − y‖²."""
    return jnp.sum(_difference(x, y) ** 2)


def _relative(lost: jax.Array, total: jax.Array) -> jax.Array:
    """Return √(lost/total), or 0 if there is nothing to lose."""
    return jnp.where(total > 0, jnp.sqrt(lost / jnp.where(total > 0, total, 1)), 0)


def _pairs(plan: Plan, tuned: Any) -> dict[str, tuple[Any, Any]]:
    """Return every array of the base by path, with the tuned one."""
    leaves, _ = flatten_with_paths(tuned, is_leaf=is_adapted)
    problems = [f"{path}: only in tuned" for path in leaves if path not in plan.leaves]
    problems += [
        f"{path}: adapted in tuned; call merge(tuned) first"
        for path in leaves
        if is_adapted(leaves[path])
    ]
    pairs = {}
    for path, before in plan.leaves.items():
        if path not in leaves:
            problems.append(f"{path}: only in base")
        elif not is_adapted(leaves[path]) and hasattr(before, "shape"):
            pairs[path] = before, leaves[path]
            shapes = before.shape, getattr(leaves[path], "shape", None)
            if shapes[0] != shapes[1]:
                problems.append(f"{path}: {shapes[0]} in base, {shapes[1]} in tuned")
    if problems:
        raise StructureError("extract: base and tuned differ:\n" + grouped(problems, "leaves"))
    return pairs


def _check_scales(plan: Plan, config: LoraConfig) -> None:
    scales = {path: config.for_path(path).scale for path in plan.layouts}
    wrong = [f"{path}: the scale is {x}" for path, x in scales.items() if not x > 0]
    if wrong:
        raise ConfigError(
            "extract divides by the scale, so alpha must be positive:\n" + grouped(wrong)
        )


def _as_float(x: Any) -> Any:
    abstract = isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
    return x if abstract else float(x)
