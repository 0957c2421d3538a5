"""What mlx-lm supports, and its embeddings: with DoRA, their rows are the outputs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_jax.core.slots import has_magnitude
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.naming import Entry, Naming, Place

#: The kinds of modules that it adapts; GPT-2's Conv1D is a linear layer there.
ADAPTABLE = ("linear", "conv1d", "embedding")
NOT_ADAPTABLE = "is neither a linear layer nor an embedding"
EXPERTS_UNSUPPORTED = "adapters of experts' parameters are not supported"


def with_rows_as_outputs(naming: Naming, lookups: Sequence[Entry]) -> Naming:
    """Return the naming with these embeddings' rows as outputs, as those of a tied head are."""
    return Naming(
        tuple(
            dataclasses.replace(entry, kind="linear", axes=entry.axes or "n d -> n d")
            if entry in lookups
            else entry
            for entry in naming.entries
        )
    )


def find_turned(adapters: Any, naming: Naming) -> list[Place]:
    """Return where the embeddings are that have DoRA and their rows as outputs."""
    nodes = {path: node for path, node in adapted_nodes(adapters).items() if has_magnitude(node)}
    places = naming.places({path: node.shape for path, node in nodes.items()})
    return [
        place
        for path, place in places.items()
        if place.entry.kind == "embedding" and place.entry.layout != nodes[path].layout.axes
    ]
