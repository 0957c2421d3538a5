"""Muon on the factors of adapters and on fully trained matrices, and Adam on all else."""

from typing import Any

import jax
import optax
from optax import contrib

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.tree import adapted_nodes
from lora_jax.core.weights import LoraWeight

#: RMS of an update over the learning rate, about that of Adam's (https://arxiv.org/abs/2502.16982).
RMS = 0.2
_BY_ADAM = ("embedding", "head")  # modules whose matrices Muon is not meant for


def muon(rate: Any, weight_decay: Any, adapters: Any) -> optax.GradientTransformation:
    """Return Muon (https://kellerjordan.github.io/posts/muon/), by optax.

    A of a weight is the matrix of its in axes and the rank, B that of the rank and its out axes;
    stacked layers and experts have one matrix each. So has a fully trained weight of several axes,
    its last two. Updates have the root mean square 0.2, so that AdamW's rates suit them. Vectors,
    embeddings and output heads are updated by Adam with the same rate and decay.
    """
    nodes = adapted_nodes(adapters)

    def axes(path: str, x: Any) -> Any:
        parent, _, field = path.rpartition("/")
        node = nodes.get(parent)
        if field in ("a", "b") and isinstance(node, LoraWeight):
            batch = len(node.layout.positions("b"))
            middle = x.ndim - 1 if field == "a" else batch + 1
            return _axes(batch, middle, x.ndim)
        is_matrix = field == "value" and x.ndim > 1 and not {*_BY_ADAM} & {*parent.split("/")}
        return _axes(x.ndim - 2, x.ndim - 1, x.ndim) if is_matrix else None

    def by_leaf(params: Any) -> Any:
        leaves, treedef = flatten_with_paths(params)
        return jax.tree.unflatten(treedef, [axes(path, x) for path, x in leaves.items()])

    return contrib.muon(
        rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        muon_weight_dimension_numbers=by_leaf,
        consistent_rms=RMS,
    )


def _axes(first: int, middle: int, last: int) -> contrib.MuonDimensionNumbers:
    return contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, last)))
