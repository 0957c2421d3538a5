"""Quantize a whole leaf: stacked layers one after another, and on a mesh where they lie."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax.core.dtypes import is_floating
from lora_jax.core.host_memory import in_memory_of, on_device
from lora_jax.core.quantized.weight import QuantizedWeight, quantize_array
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.meshes import has_explicit_mesh
from lora_jax.core.sharding.placement import put
from lora_jax.core.sharding.quantized import entries_of, field_shardings


def quantize_leaf(w: Any, kind: str, axis: int) -> tuple[QuantizedWeight, Any]:
    """Return a floating array as codes and scales, and whether all of its numbers are finite.

    Args:
      w: an array, a tracer or a `ShapeDtypeStruct`, whose sharding the codes get.
      kind: a name in `KINDS` that can be written.
      axis: the axis that is divided into blocks. What leading axes before it count, layers or
        experts, is quantized in turn, so that there are float32 values of one at a time; but not
        under tracing, and not where a mesh shards them.

    >>> weight, is_finite = quantize_leaf(jnp.ones((2, 64, 3)), "nf4", axis=1)
    >>> weight, bool(is_finite)
    (QuantizedWeight(float32[2,64,3], nf4, axis=-2), True)
    """
    ndim = len(w.shape)
    axis = axis % ndim - ndim
    shapes = jax.eval_shape(
        functools.partial(_quantize, kind=kind, axis=axis), jax.ShapeDtypeStruct(w.shape, w.dtype)
    )
    sharding = named_sharding(w)
    shardings = None if sharding is None else field_shardings(shapes[0], sharding)
    if isinstance(w, jax.ShapeDtypeStruct):
        return _placed(shapes[0], shardings), shapes[1]
    key = (kind, axis, tuple((shardings or {}).items()))
    leading = w.shape[: max(0, min(axis, -2) + ndim)]
    entries = entries_of(None if sharding is None else sharding.spec, ndim)
    is_whole = isinstance(w, jax.core.Tracer) or any(entries[: len(leading)])
    w_on_device = on_device(w)
    if is_whole or math.prod(leading) < 2:
        found = _whole(*key)(w_on_device)
    else:
        found = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        found = _placed(found[0], shardings), ~found[1]
        for index in np.ndindex(leading):
            found = _one_in_turn(*key)(found, w_on_device, index)
    return jax.tree.map(lambda x: in_memory_of(x, w), found[0]), found[1]


@functools.lru_cache(maxsize=128)
def _whole(kind: str, axis: int, shardings: tuple) -> Any:
    """Return a function of an array that is quantized whole, its fields with these shardings."""

    @jax.jit
    def call(w: jax.Array) -> tuple[QuantizedWeight, jax.Array]:
        weight, is_finite = _automatic(w, kind, axis)
        return _placed(weight, dict(shardings)), is_finite

    return call


@functools.lru_cache(maxsize=128)
def _one_in_turn(kind: str, axis: int, shardings: tuple) -> Any:
    """Return a function that quantizes one of a stack, and writes it into the fields of all."""

    @functools.partial(jax.jit, donate_argnums=0)
    def call(found: Any, w: jax.Array, index: tuple[Any, ...]) -> tuple[QuantizedWeight, jax.Array]:
        weight, is_finite = _automatic(w[index], kind, axis)
        fields = jax.tree.map(lambda all, one: all.at[index].set(one), found[0], weight)
        return _placed(fields, dict(shardings)), found[1] & is_finite

    return call


def _automatic(w: jax.Array, kind: str, axis: int) -> tuple[QuantizedWeight, jax.Array]:
    """Return what `_quantize` does; along explicit axes of a mesh with the shardings of `w`."""
    run = functools.partial(_quantize, kind=kind, axis=axis)
    if not has_explicit_mesh(w):
        return run(w)
    shapes, _ = jax.eval_shape(run, jax.ShapeDtypeStruct(w.shape, w.dtype))
    named = field_shardings(shapes, jax.typeof(w).sharding)
    specs = dataclasses.replace(shapes, fields={name: x.spec for name, x in named.items()})
    return jax.sharding.auto_axes(run, out_sharding=(specs, PartitionSpec()))(w)


def _quantize(w: jax.Array, kind: str, axis: int) -> tuple[QuantizedWeight, jax.Array]:
    weight = quantize_array(w, kind, axis)
    floats = [x for x in (w, *weight.fields.values()) if is_floating(x)]
    return weight, jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


def _placed(weight: QuantizedWeight, shardings: Any) -> QuantizedWeight:
    if not shardings:
        return weight
    fields = {name: put(x, shardings[name]) for name, x in weight.fields.items()}
    return dataclasses.replace(weight, fields=fields)
