"""How activations lie on a mesh: their rows as the batch, their heads and hidden units as weights.

On a mesh with explicit axes a program must say so where JAX cannot tell: where both sides of a
product are sharded along the axes that are summed (the layer that closes a tensor-parallel block),
and in an embedding's lookup. On the automatic axes of the mesh in use (`jax.set_mesh`) a constraint
on the residual stream keeps the compiler from sharding it as weights are for FSDP. On no mesh these
are the ordinary operations.
"""

import math
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.core.sharding.meshes import has_explicit_mesh

AXES_OF_ROWS = ("data", "fsdp")  # of a mesh: batches are sharded along both


def dot_general(x: Any, kernel: Any, dimension_numbers: Any, *args: Any, **options: Any) -> Any:
    """Compute `lax.dot_general` without batch axes; for the `dot_general` of a `linen.Dense`.

    The result is sharded as `x` along the axes of `x`, and as `kernel` along those of `kernel` by
    the axes of the mesh that are left: the axis of FSDP, along which batches are sharded too, is
    gathered.
    """
    if has_explicit_mesh(kernel) or has_explicit_mesh(x):
        (summed, summed_of_kernel), _ = dimension_numbers
        kept = [e for i, e in enumerate(_spec(x)) if i not in summed]
        used = {name for entry in _spec(x) for name in _names(entry)}
        made = [e for i, e in enumerate(_spec(kernel)) if i not in summed_of_kernel]
        entries = [*kept, *(tuple(n for n in _names(e) if n not in used) or None for e in made)]
        options["out_sharding"] = NamedSharding(_mesh(x, kernel), PartitionSpec(*entries))
    return lax.dot_general(x, kernel, dimension_numbers, *args, **options)


def automatic_axes(*names: str) -> dict[str, int]:
    """Return the sizes of those automatic axes of the mesh in use that have one of the names."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: n for name, n, kind in axes if name in names and kind == AxisType.Auto}


def by_rows(x: jax.Array) -> jax.Array:
    """Return `x` `[rows, ...]`, of which each device has the rows that it has of a batch."""
    axes = automatic_axes(*AXES_OF_ROWS)
    if not axes or x.shape[0] % math.prod(axes.values()):
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(tuple(axes), *[None] * (x.ndim - 1)))


class Embedding(nn.Embed):
    """`linen.Embed` whose rows are sharded as the ids are."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Look up `[...]` ids: `[..., features]`."""
        table: Any = self.promote_dtype(self.embedding, dtype=self.dtype, inexact=False)[0]
        if not has_explicit_mesh(table) and not has_explicit_mesh(inputs):
            return by_rows(super().__call__(inputs))
        spec = PartitionSpec(*_spec(inputs), None)
        return table.at[inputs].get(out_sharding=NamedSharding(_mesh(table, inputs), spec))

    def attend(self, query: jax.Array) -> jax.Array:
        """Multiply `[..., features]` by all rows: `[..., num_embeddings]`."""
        states, table = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        return dot_general(states, table, (((query.ndim - 1,), (1,)), ((), ())))


def _mesh(*values: Any) -> Any:
    return next(jax.typeof(x).sharding.mesh for x in values if has_explicit_mesh(x))


def _spec(x: Any) -> tuple[Any, ...]:
    """Return how each axis is sharded."""
    spec = jax.typeof(x).sharding.spec
    return (*spec, *[None] * (jax.typeof(x).ndim - len(spec)))


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
