"""`summary` and `count_params`: what is adapted, how each weight is used, and what trains."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.adapters.split import base_of
from lora_jax.core.params_argument import params_first
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from lora_jax.core.slots import is_known, slot_rank
from lora_jax.core.tree import unwrapped
from lora_jax.core.weights import (
    Adapted,
    LoraWeight,
    TrainedLeaf,
    TrainedRows,
    is_adapted,
    is_weight,
)
from lora_jax.engine.custom_rules import Rule
from lora_jax.engine.layout_inference import infer_uses
from lora_jax.engine.left_out import matrices_left_out
from lora_jax.engine.uses import Use

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

    A quantized weight counts as the numbers that it stands for. All adapters of a stack count, with
    their padding.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> count_params(lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config))
    Counts(trainable=7, total=19)
    """
    trainable = total = 0
    for leaf in jax.tree_util.tree_leaves(unwrapped(params), is_leaf=is_weight):
        if not is_adapted(leaf):
            total += _size(leaf)
            continue
        trained, base = _trained(leaf), _size(leaf.w)
        trainable += trained
        # A trained value replaces its base leaf, or rows of it: that counts once.
        is_beside = isinstance(leaf, LoraWeight) or leaf.slots is not None
        total += trained + base if is_beside else max(trained, base)
    return Counts(trainable, total)


def _size(leaf: Any) -> int:
    return math.prod(leaf.shape) if hasattr(leaf, "shape") else 0


def _trained(node: Adapted) -> int:
    if isinstance(node, LoraWeight):
        return _size(node.a) + _size(node.b) + _size(node.magnitude)
    return _size(node.value)


def summary(
    params: Any,
    fn: Callable | None = None,
    *args: Any,
    rules: Mapping[str, Rule] | None = None,
    argnum: int = 0,
    argname: str | None = None,
    **kwargs: Any,
) -> str:
    """Return a table of the adapted leaves, and below it how many parameters train.

    It has one line per leaf: path, shape, layout (b batch, i in, o out), what the program does with
    it, rank, and number of trained parameters; then one line per kind of quantized weights, adapted
    or not. The last line has the format of Hugging Face PEFT. For a stack of adapters a line says
    how many there are, and a leaf shows their least and largest rank; 0 is one without that target.

    With the function and its example arguments, as for `init`, another table lists the matrices
    (leaves of two axes or more) that are not adapted, each with the reason: the primitives that use
    it and their lines.

    Args:
      params: a tree of arrays or `ShapeDtypeStruct`s, as `init` returns it, or a model of
        `lora_jax.nnx` or `lora_jax.equinox`.
      fn: the function that runs on the parameters; None for the first table alone.
      *args: its other example arguments.
      rules: as for `init`.
      argnum: the position of the parameters among the arguments of `fn`, as for `init`.
      argname: their name, as for `init`.
      **kwargs: example keyword arguments.

    Returns:
      The tables as one string of several lines.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoraConfig(rank=1)
    >>> print(summary(lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)))
    path    shape   layout  used by  rank  trained
    kernel  [4, 3]  io      -           1        7
    trainable params: 7 || all params: 19 || trainable%: 36.8421
    """
    params = unwrapped(params)
    nodes, _ = flatten_with_paths(params, is_leaf=is_adapted)
    rows: list[tuple[str, ...]] = [("path", "shape", "layout", "used by", "rank", "trained")]
    rows += [_row(path, node) for path, node in nodes.items() if is_adapted(node)]
    lines = [*(_aligned(rows) if len(rows) > 1 else []), *_quantized(nodes), *_slots(nodes)]
    trainable, total = count_params(params)
    percent = 100 * trainable / total if total else 0.0
    lines.append(
        f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {percent:.4f}"
    )
    if fn is not None:
        uses_of = params_first("summary", fn, argnum, argname)
        lines += _left_out(params, infer_uses(uses_of, base_of(params), args, kwargs, rules))
    return "\n".join(lines)


def _quantized(nodes: Mapping[str, Any]) -> list[str]:
    """Return one line per kind: the quantized weights, and the memory that they take."""
    bases = [node.w if is_adapted(node) else node for node in nodes.values()]
    kinds: dict[str, list[Any]] = {}
    for w in filter(is_quantized, bases):
        kinds.setdefault(w.kind, []).append(w)
    lines = []
    for kind, weights in kinds.items():
        size, nbytes = sum(w.size for w in weights), sum(w.nbytes for w in weights)
        some = f"{len(weights)} weights" if len(weights) > 1 else "1 weight"
        bits = 8 * nbytes / size if size else 0.0
        lines.append(f"{kind}: {some}, {size:,} numbers in {nbytes:,} bytes ({bits:.2f} bits each)")
    return lines


def _slots(nodes: Mapping[str, Any]) -> list[str]:
    """Return a line about a stack of adapters, if it is one."""
    counts = {n for node in nodes.values() if is_adapted(node) and (n := node.slots) is not None}
    return [f"a stack of {n} adapters, each padded to the largest rank" for n in counts]


def _ranks(node: LoraWeight) -> str:
    """Return the rank; of the adapters of a stack, the least and the largest."""
    if not is_known(node):
        return str(node.rank)
    ranks = np.asarray(slot_rank(node.slot)).astype(int).reshape(-1)
    return str(ranks[0]) if np.ptp(ranks) == 0 else f"{ranks.min()}-{ranks.max()}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines; columns from the fifth on are numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i >= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _left_out(params: Any, uses: Mapping[str, Sequence[Use]]) -> list[str]:
    """Return the lines about matrices that are not adapted, if there are any."""
    leaves, _ = flatten_with_paths(params, is_leaf=is_adapted)
    plain = {path: leaf for path, leaf in leaves.items() if not is_adapted(leaf)}
    reasons = matrices_left_out(plain, uses)
    rows = [("left out", "shape", "why")]
    for path, leaf in plain.items():
        if len(getattr(leaf, "shape", ())) > 1:
            why, _ = reasons.get(path, ("the configuration leaves it out", False))
            rows.append((path, str(list(leaf.shape)), why))
    return ["", *_aligned(rows)] if len(rows) > 1 else []


def _row(path: str, node: Adapted) -> tuple[str, ...]:
    shape = str(list(node.shape))
    if isinstance(node, TrainedLeaf):
        return path, shape, "-", "fully trained", "-", f"{_trained(node):,}"
    uses = ", ".join(USE_NAMES.get(use, use) for use in node.layout.uses) or "-"
    if isinstance(node, TrainedRows):
        rows = f"{uses}; {len(node.rows)} rows trained"
        return path, shape, node.layout.axes, rows, "-", f"{_trained(node):,}"
    return path, shape, node.layout.axes, uses, _ranks(node), f"{_trained(node):,}"
