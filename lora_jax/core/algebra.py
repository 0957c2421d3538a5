"""The algebra of one adapted weight: its update and its dense form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.dora import by_output, gain_from_norms, output_letters
from lora_jax.core.dtypes import accumulator
from lora_jax.core.host_memory import on_device
from lora_jax.core.layout import subscripts
from lora_jax.core.quantized.coding import Coding
from lora_jax.core.quantized.weight import QuantizedWeight, is_quantized
from lora_jax.core.sharding.meshes import einsum, on_mesh_of, reshard_like
from lora_jax.core.slots import slot_has_magnitude
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows, scaled_factors


def delta(weight: LoraWeight) -> jax.Array:
    """Return the dense update `scale · A · B` in float32 (float64 if a factor is).

    >>> import jax.numpy as jnp
    >>> from lora_jax import Layout
    >>> a, b = jnp.array([[2.0], [3.0]]), jnp.array([[1.0, 2.0]])
    >>> delta(LoraWeight(None, a, b, jnp.float32(0.5), layout=Layout("io")))
    Array([[1. , 2. ],
           [1.5, 3. ]], dtype=float32)
    """
    sub_a, sub_b, _, sub_w = subscripts(weight.layout)
    a, b = scaled_factors(weight, accumulator(weight.a.dtype, weight.b.dtype))
    # A merge must not lose digits to an accelerator's fast modes of reduced precision.
    return einsum(f"{sub_a},{sub_b}->{sub_w}", a, b, precision=jax.lax.Precision.HIGHEST)


def dense(node: Adapted, dtype: Any = None) -> jax.Array:
    """Return the leaf that `node` means, `W + scale · A · B`, as one array.

    The sum is computed in float32 (float64 if an array is) and rounded once to `dtype`, by default
    the dtype of the base leaf. A quantized base counts with its values, in its dtype.
    """
    dtype = dtype or node.w.dtype
    w = on_device(node.w)
    node = dataclasses.replace(node, w=w.dequantize() if is_quantized(w) else w)
    if isinstance(node, TrainedLeaf):
        return jnp.where(node.scale != 0, node.value.astype(dtype), node.w.astype(dtype))
    if isinstance(node, TrainedRows):
        w = node.w.astype(dtype)
        return node.replace(w, jnp.where(node.scale != 0, node.value.astype(dtype), node.select(w)))
    update = reshard_like(on_mesh_of(delta(node), node.w), node.w)
    total = node.w.astype(accumulator(update.dtype, node.w.dtype)) + update
    if node.magnitude is not None:
        ins = node.layout.positions("i")
        gains = gain_from_norms(node, jnp.sqrt(by_output(node.layout, jnp.square(total).sum(ins))))
        order = "".join(sorted(output_letters(node.layout)))
        gains = jnp.einsum(f"{output_letters(node.layout)}->{order}", gains)
        total = total * jnp.expand_dims(gains, ins)
    return total.astype(dtype)


def requantized(node: Adapted, coding: Coding) -> QuantizedWeight:
    """Return the leaf that `node` means, quantized; its base is quantized too.

    The sum is computed in float32, from values that are not rounded to the base's dtype. Where the
    adapter changes nothing, because its scale, A or B is zero, the base's own codes are kept.
    """
    w = on_device(node.w)
    values = dataclasses.replace(w, dtype=jnp.dtype(jnp.float32)).dequantize()
    made = coding.encode(dense(dataclasses.replace(node, w=values), jnp.float32))
    if coding != Coding.of(w):
        return made
    off = _changes_nothing(node)
    return jax.tree.map(lambda old, new: jnp.where(off, old, new), w, made)


def _changes_nothing(node: Adapted) -> jax.Array:
    """Return whether an adapter is without effect, of a stack per layer, beside ones."""
    off = node.scale == 0
    if not isinstance(node, LoraWeight):
        return off
    n = off.ndim
    same = ~(_any(node.a, n) & _any(node.b, n))
    if node.magnitude is None:
        off |= same
    elif node.slot is not None:
        off |= same & ~slot_has_magnitude(node.slot)
    inner = [i for i in range(len(node.layout.axes)) if i not in node.layout.positions("b")]
    return jnp.expand_dims(off, inner)


def _any(x: jax.Array, n_batch: int) -> jax.Array:
    return (x != 0).any(range(n_batch, x.ndim))
