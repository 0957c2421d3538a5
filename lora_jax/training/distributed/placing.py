"""Put arrays on a mesh that may span processes; each process gives its own shards."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.core.sharding.placement import put
from lora_jax.training.batching import Batch
from lora_jax.training.distributed.mesh import row_sharding


def place_rows(mesh: Mesh) -> Callable[[Batch], dict[str, jax.Array]]:
    """Return a function that puts a batch on a mesh, its rows divided over `data` and `fsdp`.

    Every process calls it with the same batch, and its devices get only their rows: those that
    `own_rows` tells, so the others may be empty.
    """
    sharding = row_sharding(mesh)

    def place(batch: Batch) -> dict[str, jax.Array]:
        return {name: put(x, sharding) for name, x in batch.items()}

    return place


def own_rows(mesh: Mesh, size: int) -> list[int]:
    """Return which of a batch's `size` rows the devices of this process get, ascending."""
    parts = row_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return sorted({row for part in parts if part for row in range(*part[0].indices(size))})


def complete(tree: Any, mesh: Mesh | None) -> Any:
    """Return a tree on a mesh: arrays that are not there yet are replicated; others stay."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array | np.ndarray):
            return x
        on_it = isinstance(x, jax.Array) and x.sharding.device_set == everywhere.device_set
        return x if on_it else put(x, everywhere)

    return jax.tree.map(one, tree)
