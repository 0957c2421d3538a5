"""One merged leaf: `W + scale · A · B` in a dtype or in codes, one layer of a stack at a time."""

import dataclasses
import enum
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.adapters.split import split
from lora_jax.core.algebra import dense, requantized
from lora_jax.core.dtypes import accumulator, round_to
from lora_jax.core.host_memory import in_memory_of, on_device
from lora_jax.core.quantized.coding import Coding, coding_of
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows

#: What a merged leaf becomes: an array of a dtype, or quantized.
Target = np.dtype | Coding


def target_of(w: Any, dtype: Any = None, requantize: bool | str = False) -> Target:
    """Return what `merge` makes of an adapted base leaf: a dtype, or a coding.

    Raises:
      ConfigError: the leaf cannot be quantized as asked.
    """
    if not requantize or not is_quantized(w):
        return jnp.dtype(dtype or w.dtype)
    return coding_of(w, requantize, "leave requantize out to get floating numbers")


def merge_layer(node: Adapted, target: Any) -> tuple[Any, jax.Array, jax.Array]:
    """Return one merged leaf, and the squared norms of what rounding lost and of the update.

    The leaf is what `merge` makes of it, to the bit; `merge`'s error is the root of the quotient,
    summed over the layers of a stack.

    Args:
      node: a leaf, or a layer as `take_layer` returns it.
      target: a dtype or, where the base is quantized, a `Coding`; see `target_of`.
    """
    base, rest = split(node)
    target = target if isinstance(target, Coding) else jnp.dtype(target)
    merged = sum_kept(base, rest, target=target, form=LoopForm.WHOLE)
    return (merged, *_norms_of(node, target))


def take_layer(node: Adapted, w: Any, at: Sequence[Any]) -> Adapted:
    """Return the part of a stacked node for one layer, its stacked axes of size 1.

    Args:
      node: adapters of a whole stack.
      w: the layer of the base, its stacked axes of size 1; an array or quantized.
      at: the layer's number for each stacked axis of the leaf, `slice(None)` for other axes.
    """
    cut = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in at)
    if isinstance(node, TrainedLeaf):
        scale = node.scale
        if jnp.ndim(scale):  # sizes of stacked layers followed by ones
            sizes = zip(cut, scale.shape, strict=True)
            scale = scale[tuple(part if size > 1 else slice(None) for part, size in sizes)]
        return dataclasses.replace(node, w=w, value=node.value[cut], scale=scale)
    batch = tuple(cut[i] for i in node.layout.positions("b"))
    if isinstance(node, TrainedRows):
        return dataclasses.replace(node, w=w, value=node.value[batch])
    magnitude = None if node.magnitude is None else node.magnitude[batch]
    parts = {"a": node.a[batch], "b": node.b[batch], "scale": node.scale[batch]}
    return dataclasses.replace(node, w=w, magnitude=magnitude, **parts)


class LoopForm(enum.Enum):
    """How the sum goes through a leaf."""

    #: All of it at once.
    WHOLE = enum.auto()
    #: One layer of a stack after the other, so that the temporary memory is one layer's.
    LAYERS = enum.auto()
    #: As LAYERS, with the stack's bits as integers: jaxlib 0.10 on a CPU converts a whole array of
    #: 16-bit floats to write one slice of it, but not one of integers. Remove this form when
    #: LAYERS takes no more temporary memory on a bfloat16 stack (`memory_analysis` tells).
    BITS = enum.auto()


def choose_form(base: Any, rest: Adapted) -> LoopForm:
    """Return how to go through a leaf: what it is, where it lies, and whether it is traced."""
    if not isinstance(rest, LoraWeight) or math.prod(rest.scale.shape) == 1:
        return LoopForm.WHOLE
    stacked, arrays = rest.layout.positions("b"), jax.tree.leaves(base)
    if is_quantized(base) and base.axis % base.ndim in stacked:
        return LoopForm.WHOLE  # blocks lie across the layers
    known = [x for x in arrays if isinstance(x, jax.Array)]
    if any(jax.typeof(x).sharding.spec[i] for x in known for i in stacked):
        return LoopForm.WHOLE
    if len(known) < len(arrays) or any(map(is_traced, jax.tree.leaves((base, rest)))):
        return LoopForm.LAYERS  # integers have no gradient
    if any(x.sharding.shard_shape(x.shape)[i] != x.shape[i] for x in known for i in stacked):
        return LoopForm.WHOLE  # the layers lie on several devices, which work at the same time
    on_cpu = all(device.platform == "cpu" for x in known for device in x.devices())
    narrow = any(jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 for x in known)
    return LoopForm.BITS if on_cpu and narrow else LoopForm.LAYERS


def _leaf(node: Adapted, target: Target) -> Any:
    """Return the leaf that a node means, as an array of a dtype or quantized."""
    return requantized(node, target) if isinstance(target, Coding) else dense(node, target)


def _sum(base: Any, rest: Adapted, *, target: Target, form: LoopForm) -> Any:
    """Return `W + scale · A · B` as an array of a dtype or quantized."""
    if form is LoopForm.WHOLE:
        return in_memory_of(_leaf(dataclasses.replace(rest, w=base), target), base)
    base_on_device = on_device(base)
    stack = _to_carry(base_on_device, form)
    in_place = _is_alike(target, base)  # then it takes the place of the layer that it read

    def one(i: jax.Array, out: Any) -> Any:
        where = _where(rest, i)
        layer = _layer(out if in_place else stack, base, rest, where)
        made = _to_carry(_leaf(layer, target), form)
        put = lambda x, part: lax.dynamic_update_slice(x, part, _starts(x, where))
        return jax.tree.map(put, out, made)

    if in_place:
        start, like = stack, base
    else:
        like = jax.eval_shape(lambda: _leaf(dataclasses.replace(rest, w=base_on_device), target))
        start = _to_carry(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), form)
    total = lax.fori_loop(0, math.prod(rest.scale.shape), one, start)
    return in_memory_of(_from_carry(total, like), base)


def _is_alike(target: Target, base: Any) -> bool:
    """Return whether a leaf becomes arrays with the shapes and dtypes of the base's."""
    if isinstance(target, Coding) or is_quantized(base):  # a dtype is equal to what has that dtype
        return isinstance(target, Coding) and is_quantized(base) and target == Coding.of(base)
    return target == jnp.dtype(base.dtype)


def _to_carry(tree: Any, form: LoopForm) -> Any:
    """Return the arrays as the loop over the layers carries them."""
    if form is not LoopForm.BITS:
        return tree
    return jax.tree.map(lambda x: _bitcast(x, f"uint{8 * x.dtype.itemsize}"), tree)


def _from_carry(tree: Any, like: Any) -> Any:
    """Return what the loop carries with the dtypes of `like`."""
    return jax.tree.map(lambda x, like: _bitcast(x, like.dtype), tree, like)


def _bitcast(x: jax.Array, dtype: Any) -> jax.Array:
    """Return the same bits as `dtype`; if `x` has it already, `x` itself, with its gradients."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def _where(rest: Any, i: jax.Array) -> dict[int, jax.Array]:
    """Return where the i-th layer of a stack is, by the batch axes of the weight."""
    index: list[jax.Array] = []  # one number per batch axis
    for size in reversed(rest.scale.shape):
        i, last = lax.div(i, size), lax.rem(i, size)
        index.insert(0, last)
    return dict(zip(rest.layout.positions("b"), index, strict=True))


def _starts(x: jax.Array, where: Mapping[int, jax.Array]) -> tuple[Any, ...]:
    return tuple(where.get(axis, 0) for axis in range(x.ndim))


def _layer(stack: Any, like: Any, rest: Any, where: Mapping[int, jax.Array]) -> LoraWeight:
    """Return a layer of a carried stack, its batch axes of size 1, in the dtypes of `like`."""
    index = tuple(where.values())

    def of_stack(x: jax.Array) -> jax.Array:
        sizes = tuple(1 if axis in where else size for axis, size in enumerate(x.shape))
        return lax.dynamic_slice(x, _starts(x, where), sizes)

    def of_factor(x: jax.Array) -> jax.Array:  # whose batch axes come first
        inner = x.shape[len(index) :]
        return lax.dynamic_slice(x, (*index, *(0 for _ in inner)), (*(1 for _ in index), *inner))

    w = _from_carry(jax.tree.map(of_stack, stack), like)
    layer = jax.tree.map(of_factor, dataclasses.replace(rest, slot=None))
    return dataclasses.replace(layer, w=w, slot=rest.slot)  # of an adapter of a stack: all layers'


_STATIC = ("target", "form")
sum_kept = jax.jit(_sum, static_argnames=_STATIC)
sum_donated = jax.jit(_sum, static_argnames=_STATIC, donate_argnums=0)


def combine(base: Any, rest: Adapted, target: Target, donate: bool) -> Any:
    """Return a merged leaf, if possible in the memory of the base, which is then deleted."""
    # Only a result of the same dtypes can take the memory of the base.
    total = sum_donated if donate and _is_alike(target, base) else sum_kept
    return total(base, rest, target=target, form=choose_form(base, rest))


@functools.partial(jax.jit, static_argnames=_STATIC)
def rounding_error(base: Any, rest: Adapted, target: Target, form: LoopForm) -> jax.Array:
    """Return ‖lost‖/‖update‖, with the squares summed layer by layer like the update itself."""
    base = on_device(base)
    layers = 1 if form is LoopForm.WHOLE else math.prod(rest.scale.shape)
    stack = _to_carry(base, form)

    def one(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        node = dataclasses.replace(rest, w=base)
        if form is not LoopForm.WHOLE:
            node = _layer(stack, base, rest, _where(rest, i))
        lost, update = _squared_norms(node, target)
        return sums[0] + lost, sums[1] + update

    zero = jnp.zeros((), _wide(base, target))
    lost, update = lax.fori_loop(0, layers, one, (zero, zero))
    return jnp.where(update > 0, jnp.sqrt(lost / jnp.where(update > 0, update, 1)), 0)


def _squared_norms(node: Adapted, target: Target) -> tuple[jax.Array, jax.Array]:
    """Return the squared norms of what rounding loses, and of the leaf's update."""
    wide = _wide(node.w, target)
    w = node.w.dequantize() if is_quantized(node.w) else node.w
    exact = dense(node, wide)
    if isinstance(target, Coding):
        rounded = requantized(node, target).dequantize().astype(wide)
    else:
        rounded = round_to(exact, target)
    lost, update = rounded - exact, exact - w.astype(wide)
    return jnp.sum(lost * lost), jnp.sum(update * update)


def _wide(base: Any, target: Target) -> Any:
    return accumulator(base.dtype, target.dtype if isinstance(target, Coding) else target)


_norms_of = jax.jit(_squared_norms, static_argnums=1)


def is_traced(x: Any) -> bool:
    """Return whether an array has no value yet, as in `jit`."""
    return isinstance(x, jax.core.Tracer)
