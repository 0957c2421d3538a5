"""`norms`: the size of each adapter, its gradient and its update, for logs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters.kept_shardings import TRAINED_FIELDS
from lora_jax.core.dora import column_products, dora_gain
from lora_jax.core.dtypes import accumulator
from lora_jax.core.errors import StructureError
from lora_jax.core.quantized.weight import dequantized, is_quantized
from lora_jax.core.slots import without_slots
from lora_jax.core.tree import adapted_nodes, require_adapted
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows


def norms(params: Any, grads: Any = None) -> dict[str, dict[str, jax.Array]]:
    """Compute Frobenius norms of each adapter: of A, B, their gradients, ΔW, and ‖ΔW‖/‖W‖.

    It runs under `jax.jit`, and `ΔW = scale · A · B` is never formed: its norm comes from Gram
    matrices of rank × rank, ‖A·B‖² = tr(AᵀA · BBᵀ), in float32 (float64 if a factor is). If A and B
    cancel, so that the norm is below 3e-4·‖A‖·‖B‖, the result is rounding error. ‖W‖ reads each
    base weight once, so call it every few steps only.

    Args:
      params: a joined tree, or an overlay of adapters.
      grads: gradients of the same structure, or None.

    Returns:
      {path: {name: norm}} with these names: "a", "b" and with DoRA "magnitude", or "value" for a
      fully trained leaf or trained rows; "update", which is ‖ΔW‖ (with DoRA, of all that changed
      the weight); "relative", which is ‖ΔW‖/‖W‖ (0 if W is zero); with `grads` also "grad_a",
      "grad_b" and so on. A norm is a scalar, or of shape `[*batch]` with one norm per layer of a
      stacked weight; in a stack of adapters there is one for each, `[slots, *batch]`. The update of
      trained rows is relative to the rows that they replace. An overlay has no W, so "relative" is
      missing, and so is "update" with DoRA.

    Raises:
      StructureError: `params` contains no adapters, or `grads` has none at one of their paths.

    >>> import jax.numpy as jnp, lora_jax
    >>> w, a, b = jnp.full((2, 2), 5.0), jnp.array([[3.0], [4.0]]), jnp.array([[0.6, 0.8]])
    >>> weight = lora_jax.LoraWeight(w, a, b, jnp.float32(2.0), layout=lora_jax.Layout("io"))
    >>> {name: float(x) for name, x in norms({"kernel": weight})["kernel"].items()}
    {'a': 5.0, 'b': 1.0, 'update': 10.0, 'relative': 1.0}
    """
    nodes = require_adapted("norms", params)
    moved = {} if grads is None else adapted_nodes(grads)
    missing = [path for path in nodes if path not in moved] if grads is not None else []
    if missing:
        raise StructureError("norms: grads has no gradients for " + ", ".join(missing))
    return {
        path: without_slots(node, _norms) | _gradients(moved.get(path))
        for path, node in nodes.items()
    }


def _norms(node: Adapted) -> dict[str, jax.Array]:
    found = _fields(node)
    base = None
    if isinstance(node, LoraWeight):
        if node.magnitude is None:
            found["update"] = _update_norm(node)
        elif node.w is not None:
            found["update"] = _dora_update_norm(node)
        if node.w is not None:
            base = _base_norm(node)
    elif node.w is not None:
        w = node.select(node.w) if isinstance(node, TrainedRows) else dequantized(node.w)
        wide = accumulator(w.dtype, node.value.dtype)
        change = node.value.astype(wide) - w.astype(wide)
        found["update"] = _norm(jnp.where(node.scale != 0, change, 0), range(_n_batch(node)))
        base = _norm(w, range(_n_batch(node)))
    if base is not None:
        found["relative"] = jnp.where(base > 0, found["update"] / jnp.where(base > 0, base, 1), 0)
    return found


def _fields(node: Adapted) -> dict[str, jax.Array]:
    """Return the norm of each trained field, whose batch axes come first."""
    arrays = {name: getattr(node, name, None) for name in TRAINED_FIELDS}
    batch = range(_n_batch(node))
    return {name: _norm(x, batch) for name, x in arrays.items() if x is not None}


def _n_batch(node: Adapted) -> int:
    return 0 if isinstance(node, TrainedLeaf) else node.layout.axes.count("b")


def _norm(x: jax.Array, kept: Sequence[int]) -> jax.Array:
    """Return the norm over all axes but the `kept` ones."""
    x = x.astype(accumulator(x.dtype))
    return jnp.sqrt(jnp.sum(x * x, [i for i in range(x.ndim) if i not in kept]))


def _base_norm(node: LoraWeight) -> jax.Array:
    """Return ‖W‖, `[*batch]`."""
    if is_quantized(node.w):  # of one stacked layer at a time
        (own, _, _), n_batch = column_products(node), _n_batch(node)
        return jnp.sqrt(own.sum(range(n_batch, own.ndim)))
    return _norm(node.w, node.layout.positions("b"))


def _update_norm(node: LoraWeight) -> jax.Array:
    """Return ‖scale · A · B‖ = |scale| · √Σ (AᵀA ∘ BBᵀ), `[*batch]`."""
    dtype, batch, rank = accumulator(node.a.dtype, node.b.dtype), node.scale.shape, node.rank
    a = node.a.astype(dtype).reshape(*batch, -1, rank)
    b = node.b.astype(dtype).reshape(*batch, rank, -1)
    highest = jax.lax.Precision.HIGHEST
    gram_a = jnp.einsum("...ir,...is->...rs", a, a, precision=highest)
    gram_b = jnp.einsum("...ro,...so->...rs", b, b, precision=highest)
    # If A and B cancel, the sum of rounded terms can be negative.
    square = jnp.maximum(jnp.sum(gram_a * gram_b, (-2, -1)), 0)
    return jnp.abs(node.scale.astype(dtype)) * jnp.sqrt(square)


def _dora_update_norm(node: LoraWeight) -> jax.Array:
    """Return ‖g·V − W‖ of DoRA, `[*batch]`: ΔW is (g − 1)·W + g·scale·A·B with the gain g."""
    (own, crossed, squared), g = column_products(node), dora_gain(node)
    square = (g - 1) ** 2 * own + 2 * g * (g - 1) * crossed + g**2 * squared
    return jnp.sqrt(jnp.maximum(square.sum(range(node.scale.ndim, square.ndim)), 0))


def _gradients(node: Adapted | None) -> dict[str, jax.Array]:
    fields = {} if node is None else without_slots(node, _fields)
    return {f"grad_{name}": norm for name, norm in fields.items()}
