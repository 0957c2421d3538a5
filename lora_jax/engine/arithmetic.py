"""Arithmetic on a `LazyWeight`: its dense form, DoRA's gain, branch dropout, the final sum."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.core.dtypes import accumulator, compute_dtype, wider
from lora_jax.core.host_memory import in_memory_of, on_device
from lora_jax.core.sharding.meshes import on_mesh_of, reshard_like
from lora_jax.engine import named_axes
from lora_jax.engine.lazy_weight import ROW, Axis, LazyWeight
from lora_jax.engine.quantized.merge_aware import served_view, straight_through
from lora_jax.engine.quantized.view import QuantizedView
from lora_jax.engine.rows.slots import NoPlaceForRows, along_rows, pick, with_scale_in_b


def to_dense(lazy: LazyWeight) -> jax.Array:
    """Return the view as an array: added in float32, rounded once to the view's dtype.

    A merge-aware weight gives the requantized sum, with the gradient of the sum.
    """
    lazy = with_scale_in_b(pick(lazy))
    if lazy.differs_by_row:
        raise NoPlaceForRows  # the sum would be one per row
    if lazy.served is not None and lazy.w is not None:
        plain = dataclasses.replace(lazy, served=None)
        return straight_through(served_view(lazy).dequantize(), to_dense(plain))
    w = base_values(lazy.w)
    if lazy.a is None or lazy.probe:
        return w
    dtype = accumulator(lazy.a.dtype, lazy.b.dtype, lazy.dtype)
    update, names = named_axes.contract(
        lazy.a.astype(dtype), lazy.a_axes, lazy.b.astype(dtype), lazy.b_axes, lazy.axes
    )
    update = named_axes.arrange(update, names, lazy.axes, lazy.sizes)
    total = update if w is None else on_device(w).astype(dtype) + update
    return in_memory_of(apply_gain(total, lazy.axes, lazy).astype(lazy.dtype), w)


def base_values(w: Any) -> Any:
    """Return a view of a base weight as an array; a tangent has None."""
    return in_memory_of(w.dequantize(), w.codes) if isinstance(w, QuantizedView) else w


def apply_gain(x: jax.Array, axes: Sequence[Axis], lazy: LazyWeight) -> jax.Array:
    """Multiply `x`, its axes named, by the weight's gain, if it has one; keep the dtype of `x`."""
    return multiply_along(x, axes, lazy.gain, lazy.gain_axes)


def multiply_along(
    x: jax.Array, axes: Sequence[Any], factor: Any, factor_axes: Sequence[Axis]
) -> jax.Array:
    """Multiply `x` by a factor along the axes that it has, all named; None is 1. Keep the dtype."""
    if factor is None:
        return x
    present = [axis for axis in axes if axis in factor_axes]
    factor = named_axes.arrange(factor, factor_axes, present, {})
    factor = jnp.expand_dims(factor, [i for i, axis in enumerate(axes) if axis not in present])
    wide = wider(x.dtype, factor.dtype)
    return (x.astype(wide) * factor.astype(wide)).astype(x.dtype)


def side_that_takes_gain(
    lazy: LazyWeight, x_axes: Collection[Axis], out_axes: Collection[Axis]
) -> str | None:
    """Return which array of a product takes the gain, "x" or "out"; None if neither has its axes.

    >>> import jax.numpy as jnp
    >>> from lora_jax.engine.lazy_weight import LazyWeight
    >>> side_that_takes_gain(LazyWeight.tracked(jnp.ones((2, 3)), "w"), (), ())
    'out'
    """
    named = set(lazy.gain_axes)
    return "out" if named <= {*out_axes} else "x" if named <= {*x_axes} else None


def cast_for_branch(
    x: jax.Array, factor: jax.Array, lazy: LazyWeight, dtype: Any = None, narrow: bool = False
) -> tuple[jax.Array, jax.Array, Any]:
    """Return both operands of a branch's product in one dtype, and the dtype of the result.

    The factor is on the activation's mesh, where that is part of the activation's type.

    They are multiplied in the wider dtype of the activation and the view; 16-bit products are
    accumulated in float32, and returned so if they need not be `narrow`. `dtype` is the
    activation's, if that is not the dtype of `x`.
    """
    compute = compute_dtype(x.dtype if dtype is None else dtype, lazy.dtype)
    keeps = compute.itemsize > 2 or (narrow and compute.itemsize == 2)
    result = compute if keeps else jnp.dtype(jnp.float32)
    factor = on_mesh_of(factor, x)
    return x.astype(compute), factor.astype(compute), result


def drop(x: jax.Array, x_axes: Sequence[Axis], lazy: LazyWeight, site: int) -> jax.Array:
    """Apply branch dropout if the weight has a key; kept values are scaled by 1/(1 - rate)."""
    if lazy.key is None:
        return x
    if ROW in lazy.key_axes:
        return _drop_rows(x, x_axes, lazy, site)
    key = jax.random.fold_in(lazy.key.reshape(-1)[0], site)
    kept = 1 - (lazy.dropout if lazy.rate is None else lax.stop_gradient(lazy.rate))
    is_kept = reshard_like(_draw(key, x) < kept, x)
    return jnp.where(is_kept, x / jnp.asarray(kept, x.dtype), jnp.zeros_like(x))


def _drop_rows(x: jax.Array, x_axes: Sequence[Axis], lazy: LazyWeight, site: int) -> jax.Array:
    """Apply the dropout of each row's own adapter."""
    keys, _ = named_axes.move_first(lazy.key, lazy.key_axes, ROW)
    fold = lambda key: jax.random.fold_in(key, site)
    keys = jax.vmap(fold)(keys.reshape(len(keys), -1)[:, 0])
    rate = jnp.asarray(lazy.dropout if lazy.rate is None else lax.stop_gradient(lazy.rate))
    kept = along_rows(1 - rate, x_axes)
    at = list(x_axes).index(ROW)
    drawn = jnp.moveaxis(_draw(keys, jnp.moveaxis(x, at, 0)), 0, at)
    is_kept = reshard_like(drawn < kept, x)
    return jnp.where(is_kept, x / jnp.asarray(kept, x.dtype), jnp.zeros_like(x))


def _draw(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Return a uniform number for each entry of `x`; under `vmap` other ones for each example.

    Every key is for one entry of the first axes of `x`.
    """
    n = keys.ndim

    @jax.custom_batching.custom_vmap
    def uniform(keys: jax.Array, x: jax.Array) -> jax.Array:
        draw = lambda key: jax.random.uniform(key, x.shape[n:])
        return jax.vmap(draw)(keys.reshape(-1)).reshape(x.shape) if n else draw(keys)

    @uniform.def_vmap
    def _(size: int, is_batched: Sequence[bool], keys: jax.Array, x: jax.Array) -> Any:
        if is_batched[0]:
            x = x if is_batched[1] else jnp.broadcast_to(x, (size, *x.shape))
            return _draw(keys, x), True
        # one key for all examples, which are one array: [examples, *keys, ...] as [*keys, examples]
        return jnp.moveaxis(_draw(keys, jnp.moveaxis(x, 0, n)), n, 0), True

    return uniform(keys, lax.stop_gradient(x))


def add(y: Any, update: jax.Array, dtype: Any) -> jax.Array:
    """Add in the wider dtype, round once to `dtype`; a tangent has no `y`.

    The sum is sharded as `y` is, where that is part of its type.
    """
    if y is None:
        return update.astype(dtype)
    update = reshard_like(update, y)
    wide = wider(y.dtype, update.dtype)
    return lax.add(y.astype(wide), update.astype(wide)).astype(dtype)
