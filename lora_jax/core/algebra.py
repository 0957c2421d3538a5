"""The algebra of one adapted weight: its update, its dense form, and the norms of its outputs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.weights import Adapted, Layout, LoraWeight, TrainedLeaf, TrainedRows

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def subscripts(layout: Layout) -> tuple[str, str, str, str]:
    """Einsum subscripts of A, B, scale and W, the rank being "Z": "aZ", "Zb", "", "ab" for "io"."""
    batch, ins, outs, every = (_pick(layout, kinds) for kinds in ("b", "i", "o", "bio"))
    return batch + ins + "Z", batch + "Z" + outs, batch, every


def _pick(layout: Layout, kinds: str) -> str:
    return "".join(LETTERS[i] for i in layout.positions(kinds))


def accumulator(*dtypes: Any) -> Any:
    """The dtype to add in: float32, or float64 where one of `dtypes` is."""
    return jnp.dtype(jnp.float64 if jnp.dtype("float64") in dtypes else jnp.float32)


def delta(weight: LoraWeight) -> jax.Array:
    """`scale · A · B`, the dense update, in float32 (float64 where a factor is).

    >>> import jax.numpy as jnp
    >>> a, b = jnp.array([[2.0], [3.0]]), jnp.array([[1.0, 2.0]])
    >>> delta(LoraWeight(None, a, b, jnp.float32(0.5), layout=Layout("io")))
    Array([[1. , 2. ],
           [1.5, 3. ]], dtype=float32)
    """
    sub_a, sub_b, _, sub_w = subscripts(weight.layout)
    a, b = _factors(weight, accumulator(weight.a.dtype, weight.b.dtype))
    # A merge must not lose digits to the fast reduced-precision modes of an accelerator.
    return jnp.einsum(f"{sub_a},{sub_b}->{sub_w}", a, b, precision=jax.lax.Precision.HIGHEST)


def _factors(weight: LoraWeight, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A and `scale · B` in `dtype`."""
    _, sub_b, sub_scale, _ = subscripts(weight.layout)
    a, b, scale = (x.astype(dtype) for x in (weight.a, weight.b, weight.scale))
    return a, jnp.einsum(f"{sub_b},{sub_scale}->{sub_b}", b, scale)


def dense(node: Adapted, dtype: Any = None) -> jax.Array:
    """The leaf that `node` means, `W + scale · A · B`: added in float32, rounded once to `dtype`.

    `dtype` defaults to the base leaf's.
    """
    dtype = dtype or node.w.dtype
    if isinstance(node, TrainedLeaf):
        return jnp.where(node.scale != 0, node.value.astype(dtype), node.w.astype(dtype))
    if isinstance(node, TrainedRows):
        w = node.w.astype(dtype)
        return node.replace(w, jnp.where(node.scale != 0, node.value.astype(dtype), node.select(w)))
    update = delta(node)
    total = node.w.astype(accumulator(update.dtype, node.w.dtype)) + update
    if node.magnitude is not None:
        ins = node.layout.positions("i")
        gains = _gain(node, jnp.sqrt(_by_output(node.layout, jnp.square(total).sum(ins))))
        order = "".join(sorted(_outputs(node.layout)))
        gains = jnp.einsum(f"{_outputs(node.layout)}->{order}", gains)
        total = total * jnp.expand_dims(gains, ins)
    return total.astype(dtype)


# --- DoRA: a direction and a magnitude for every output -------------------------------------------


def gain(node: LoraWeight) -> jax.Array:
    """`magnitude / ‖W + scale·A·B‖`, `[*batch, *out]`, in float32 (float64 where an array is).

    DoRA multiplies each output of `V = W + scale·A·B` with it. It is had from the factors, see
    `column_norms`, and the norm is a constant to the derivative, as section 4.3 of
    https://arxiv.org/abs/2402.09353 has it. Where the scale is 0 it is 1: `disable` is the base.

    >>> import jax.numpy as jnp
    >>> w, a, b = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([[0.0], [4.0]]), jnp.eye(2)[:1]
    >>> one, magnitude = jnp.float32(1.0), jnp.array([10.0, 1.0])
    >>> gain(LoraWeight(w, a, b, one, magnitude, layout=Layout("io")))
    Array([2., 1.], dtype=float32)
    """
    return _gain(node, column_norms(node))


def column_norms(node: LoraWeight) -> jax.Array:
    """`‖W + scale·A·B‖` over the in axes, `[*batch, *out]`: where a magnitude starts.

    A constant to the derivative.
    """
    own, crossed, squared = column_products(node)
    return jnp.sqrt(jnp.maximum(own + 2 * crossed + squared, 0))  # rounding can go below zero


def column_products(node: LoraWeight) -> tuple[jax.Array, jax.Array, jax.Array]:
    """⟨W, W⟩, ⟨W, ΔV⟩ and ⟨ΔV, ΔV⟩ over the in axes, `[*batch, *out]`, with ΔV = scale·A·B.

    With `B' = scale·B` they are Σ W², ⟨B', Aᵀ·W⟩ and ⟨B', AᵀA·B'⟩: no array of the weight's size is
    formed. Constants to the derivative.
    """
    w, a, b, scale = jax.lax.stop_gradient((node.w, node.a, node.b, node.scale))
    node = LoraWeight(w, a, b, scale, layout=node.layout)
    sub_a, sub_b, batch, sub_w = subscripts(node.layout)
    dtype = accumulator(w.dtype, a.dtype, b.dtype)
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    narrow = w.dtype if w.dtype.itemsize <= 2 else dtype
    pair = _rank_first(a.astype(narrow), len(batch)), w.astype(narrow)
    sub_rank_first = f"{batch}Z{sub_a[len(batch) : -1]}"
    crossed = einsum(f"{sub_rank_first},{sub_w}->{sub_b}", *pair, preferred_element_type=dtype)
    a, b = _factors(node, dtype)
    gram = einsum(f"{sub_a},{sub_a.replace('Z', 'Y')}->{batch}ZY", a, a)
    squared = einsum(f"{batch}ZY,{sub_b.replace('Z', 'Y')}->{sub_b}", gram, b)
    own = jnp.square(w.astype(dtype)).sum(node.layout.positions("i"))
    rank = len(batch)
    return _by_output(node.layout, own), (b * crossed).sum(rank), (b * squared).sum(rank)


def _rank_first(a: jax.Array, n_batch: int) -> jax.Array:
    """A as `[*batch, rank, *in]`; one of 16 bits laid out so, or the CPU widens all of W for it."""
    moved = jnp.moveaxis(a, -1, n_batch)
    if a.dtype.itemsize > 2 or any(jax.typeof(a).sharding.spec):
        return moved
    return jax.lax.optimization_barrier(moved.reshape(-1)).reshape(moved.shape)


def _gain(node: LoraWeight, norms: jax.Array) -> jax.Array:
    scale, norms = jax.lax.stop_gradient((node.scale, norms))
    on = jnp.expand_dims(scale != 0, range(scale.ndim, norms.ndim)) & (norms > 0)
    return jnp.where(on, node.magnitude.astype(norms.dtype) / jnp.where(on, norms, 1), 1)


def _outputs(layout: Layout) -> str:
    return _pick(layout, "b") + _pick(layout, "o")


def _by_output(layout: Layout, x: jax.Array) -> jax.Array:
    """`[*batch, *out]` of an array that has these axes in the weight's order."""
    return jnp.einsum(f"{''.join(sorted(_outputs(layout)))}->{_outputs(layout)}", x)
