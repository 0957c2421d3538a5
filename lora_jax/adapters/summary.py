"""`summary` and `count_params`: what is adapted, how each weight is used, and what trains."""

import math
from typing import Any, NamedTuple

import jax

from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.weights import Adapted, LoraWeight, TrainedLeaf, TrainedRows, is_adapted

USE_NAMES = {
    "dot_general": "matmul",
    "conv_general_dilated": "convolution",
    "gather": "lookup",
}


class Counts(NamedTuple):
    """Numbers of elements; scales are not weights and are not counted.

    >>> print(Counts(trainable=7, total=19))
    trainable params: 7 || all params: 19 || trainable%: 36.8421052631579
    """

    trainable: int
    total: int

    def __str__(self) -> str:
        """Return the line that Hugging Face PEFT prints, with every digit."""
        percent = 100 * self.trainable / self.total if self.total else 0.0
        return (
            f"trainable params: {self.trainable} || all params: {self.total} || "
            f"trainable%: {percent}"
        )


def count_params(params: Any) -> Counts:
    """Count the parameters that train, and all of them with A and B; shapes are enough.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> count_params(lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config))
    Counts(trainable=7, total=19)
    """
    trainable = total = 0
    for leaf in jax.tree_util.tree_leaves(params, is_leaf=is_adapted):
        if not is_adapted(leaf):
            total += _size(leaf)
            continue
        trained, base = _trained(leaf), _size(leaf.w)
        trainable += trained
        # A trained value replaces its base leaf, or rows of it: that counts once.
        total += trained + base if isinstance(leaf, LoraWeight) else max(trained, base)
    return Counts(trainable, total)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) if hasattr(leaf, "shape") else 0


def _trained(node: Adapted) -> int:
    if isinstance(node, LoraWeight):
        return _size(node.a) + _size(node.b) + _size(node.magnitude)
    return _size(node.value)


def summary(params: Any) -> str:
    """Return a table of the adapted leaves, and below it how many parameters train.

    It has one line per leaf: path, shape, layout (b batch, i in, o out), what the program does with
    it, rank, and number of trained parameters. The last line has the format of Hugging Face PEFT.
    `params` may contain arrays or `ShapeDtypeStruct`s.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> print(summary(lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)))
    path    shape   layout  used by  rank  trained
    kernel  [4, 3]  io      -           1        7
    trainable params: 7 || all params: 19 || trainable%: 36.8421
    """
    nodes, _ = flatten_with_paths(params, is_leaf=is_adapted)
    rows: list[tuple[str, ...]] = [("path", "shape", "layout", "used by", "rank", "trained")]
    rows += [_row(path, node) for path, node in nodes.items() if is_adapted(node)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if i >= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    trainable, total = count_params(params)
    percent = 100 * trainable / total if total else 0.0
    lines.append(
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {percent:.4f}"
    )
    return "\n".join(lines)


def _row(path: str, node: Adapted) -> tuple[str, ...]:
    shape = str(list(node.shape))
    if isinstance(node, TrainedLeaf):
        return path, shape, "-", "fully trained", "-", f"{_trained(node):,}"
    uses = ", ".join(USE_NAMES.get(use, use) for use in node.layout.uses) or "-"
    if isinstance(node, TrainedRows):
        rows = f"{uses}; {len(node.rows)} rows trained"
        return path, shape, node.layout.axes, rows, "-", f"{_trained(node):,}"
    return path, shape, node.layout.axes, uses, str(node.rank), f"{_trained(node):,}"
