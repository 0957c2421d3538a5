"""DoRA: the column norms of an adapted weight, and the gain that multiplies its outputs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.dtypes import accumulator
from lora_jax.core.host_memory import on_device
from lora_jax.core.layout import Layout, pick, subscripts
from lora_jax.core.quantized.weight import dequantized, is_quantized
from lora_jax.core.sharding.meshes import (
    einsum,
    has_explicit_mesh,
    is_sharded,
    on_mesh_of,
    reshard_like,
)
from lora_jax.core.slots import slot_has_magnitude, without_slots
from lora_jax.core.weights import LoraWeight, scaled_factors


def dora_gain(node: LoraWeight) -> jax.Array:
    """Return `magnitude / ‖W + scale·A·B‖`, `[*batch, *out]`, in float32 (float64 if an array is).

    DoRA multiplies each output of `V = W + scale·A·B` by this gain. It is computed from the
    factors, see `column_norms`; the norm is a constant to the derivative, as in section 4.3 of
    https://arxiv.org/abs/2402.09353. Where the scale is 0 the gain is 1: `disable` is the base.

    >>> import jax.numpy as jnp
    >>> w, a, b = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0], [4.0]]), jnp.eye(2)[:1]
    >>> one, magnitude = jnp.float32(1.0), jnp.array([10.0, 1.0])
    >>> dora_gain(LoraWeight(w, a, b, one, magnitude, layout=Layout("io")))
    Array([2., 1.], dtype=float32)
    """
    return without_slots(node, lambda one: gain_from_norms(one, column_norms(one)))


def column_norms(node: LoraWeight) -> jax.Array:
    """Return `‖W + scale·A·B‖` over the in axes, `[*batch, *out]`: a magnitude's initial value.

    It is a constant to the derivative.
    """
    own, crossed, squared = column_products(node)
    return jnp.sqrt(jnp.maximum(own + 2 * crossed + squared, 0))  # rounding may give less than zero


def column_products(node: LoraWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return ⟨W, W⟩, ⟨W, ΔV⟩ and ⟨ΔV, ΔV⟩ over the in axes, `[*batch, *out]`, ΔV = scale·A·B.

    With `B' = scale·B` they are Σ W², ⟨B', Aᵀ·W⟩ and ⟨B', AᵀA·B'⟩: no array of the weight's size is
    formed, but of a quantized weight its values, of one stacked layer at a time. They are constants
    to the derivative.
    """
    if is_quantized(node.w) and _is_stack(node):
        return _in_turn(column_products, node)
    w, a, b, scale = jax.lax.stop_gradient((on_device(node.w), node.a, node.b, node.scale))
    w = dequantized(w)
    a, b = on_mesh_of(a, w), on_mesh_of(b, w)
    node = LoraWeight(w, a, b, scale, layout=node.layout)
    sub_a, sub_b, batch, sub_w = subscripts(node.layout)
    dtype = accumulator(w.dtype, a.dtype, b.dtype)
    product = functools.partial(einsum, precision=jax.lax.Precision.HIGHEST)
    narrow = w.dtype if w.dtype.itemsize <= 2 else dtype
    pair = _rank_first(a.astype(narrow), len(batch)), w.astype(narrow)
    sub_rank_first = f"{batch}Z{sub_a[len(batch) : -1]}"
    crossed = product(f"{sub_rank_first},{sub_w}->{sub_b}", *pair, preferred_element_type=dtype)
    a, b = scaled_factors(node, dtype)
    gram = product(f"{sub_a},{sub_a.replace('Z', 'Y')}->{batch}ZY", a, a)
    squared = product(f"{batch}ZY,{sub_b.replace('Z', 'Y')}->{sub_b}", gram, b)
    own = jnp.square(w.astype(dtype)).sum(node.layout.positions("i"))
    crossed, squared = ((b * reshard_like(x, b)).sum(len(batch)) for x in (crossed, squared))
    return reshard_like(by_output(node.layout, own), squared), crossed, squared


def _is_stack(node: LoraWeight) -> bool:
    """Return whether the first axis of a quantized weight stacks others, all on each device."""
    codes = node.w.fields[node.w.format.codes]
    is_divided = node.w.axis == -node.w.ndim  # into blocks
    return node.layout.axes[0] == "b" and not is_divided and not has_explicit_mesh(codes)


def _in_turn(fn: Callable[[LoraWeight], Any], node: LoraWeight) -> Any:
    """Return `fn` of each of the weights that the first axis stacks, stacked."""
    layout = Layout(node.layout.axes[1:])

    def one(arrays: tuple[Any, ...]) -> Any:
        w, a, b, scale = arrays
        return fn(LoraWeight(w, a, b, scale, layout=layout))

    return jax.lax.map(one, (on_device(node.w), node.a, node.b, node.scale))


def _rank_first(a: jax.Array, n_batch: int) -> jax.Array:
    """Return A as `[*batch, rank, *in]`; 16-bit, in that layout, or the CPU widens all of W."""
    moved = jnp.moveaxis(a, -1, n_batch)
    if a.dtype.itemsize > 2 or is_sharded(a):
        return moved
    return jax.lax.optimization_barrier(moved.reshape(-1)).reshape(moved.shape)


def gain_from_norms(node: LoraWeight, norms: jax.Array) -> jax.Array:
    """Return `magnitude / norms`; 1 where scale or norm is 0, or a slot has no magnitude."""
    scale, norms = jax.lax.stop_gradient((node.scale, norms))
    magnitude = on_mesh_of(node.magnitude, norms)
    norms = reshard_like(norms, magnitude)
    on = jnp.expand_dims(scale != 0, range(scale.ndim, norms.ndim)) & (norms > 0)
    if node.slot is not None:
        on &= slot_has_magnitude(node.slot)
    return jnp.where(on, magnitude.astype(norms.dtype) / jnp.where(on, norms, 1), 1)


def output_letters(layout: Layout) -> str:
    """Return the einsum letters of `[*batch, *out]`."""
    return pick(layout, "b") + pick(layout, "o")


def by_output(layout: Layout, x: jax.Array) -> jax.Array:
    """Transpose an array with these axes in the weight's order to `[*batch, *out]`."""
    return jnp.einsum(f"{''.join(sorted(output_letters(layout)))}->{output_letters(layout)}", x)
