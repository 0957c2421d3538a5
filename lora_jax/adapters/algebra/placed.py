"""Where the arrays of a computed node lie."""

import dataclasses
from typing import TypeVar

import jax

from lora_jax.core.host_memory import in_memory_of
from lora_jax.core.sharding.data_axes import named_sharding
from lora_jax.core.sharding.placement import arrays_of, put
from lora_jax.core.weights import Adapted

Node = TypeVar("Node", bound=Adapted)


def place_like(node: Node, like: Adapted) -> Node:
    """Return a node with its arrays, except `w`, where another node of the same weight has them.

    The rank, which may differ, is never sharded. Under tracing the compiler shards the arrays.
    """
    placed = {}
    for field, x in arrays_of(node).items():
        if field == "w":
            continue
        own = getattr(like, field)
        sharding = None if isinstance(x, jax.core.Tracer) else named_sharding(own)
        placed[field] = in_memory_of(x, own) if sharding is None else put(x, sharding)
    return dataclasses.replace(node, **placed)
