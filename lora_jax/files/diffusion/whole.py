"""A change of a weight that is not of low rank, and the factors that come closest to it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

from lora_jax.files.torch_adapters.factors import TorchFactors


@dataclasses.dataclass(frozen=True)
class Whole:
    """A change `[out, *in]` of a weight, computed when it is asked for.

    Attributes:
      method: what gave it.
      outputs: the number of the weight's outputs.
      compute: returns the change in float64, without DoRA, of the weight that it gets, or None.
      magnitude: `[out]`, with DoRA.
      column_magnitude: `[in]`, with LyCORIS' DoRA by inputs (`wd_on_out=False`).
      of_base: whether the change depends on the weight.
    """

    method: str
    outputs: int
    compute: Callable[[Any], np.ndarray]
    magnitude: np.ndarray | None = None
    column_magnitude: np.ndarray | None = None
    of_base: bool = False

    def change(self, base: np.ndarray | None) -> np.ndarray | None:
        """Return the change with DoRA's gains, or None if that needs the base's values.

        >>> one = Whole("diff", 1, lambda _: np.array([[0.0, 4.0]]), magnitude=np.array([10.0]))
        >>> one.change(np.array([[3.0, 0.0]]))
        array([[3., 8.]])
        """
        if base is None and self.of_base:
            return None
        base = None if base is None else base.astype("float64")
        update = self.compute(base)
        by_column = self.column_magnitude is not None
        magnitude = self.column_magnitude if by_column else self.magnitude
        if magnitude is None:
            return update
        if base is None:
            return None
        total = base + update
        others = tuple(i for i in range(total.ndim) if i != by_column)
        norms = np.sqrt(np.square(total).sum(others, keepdims=True))
        wanted = magnitude.astype("float64").reshape(norms.shape)
        return total * np.where(norms > 0, wanted / np.where(norms > 0, norms, 1), 1) - base

    def closest(self, rank: int, base: np.ndarray | None) -> TorchFactors | None:
        """Return the factors of this rank that come closest to the change, as `change` does.

        DoRA by outputs stays a magnitude.
        """
        change = dataclasses.replace(self, magnitude=None).change(base)
        if change is None:
            return None
        return dataclasses.replace(_truncate(change, rank), magnitude=self.magnitude)


def _truncate(change: np.ndarray, rank: int) -> TorchFactors:
    """Return the truncated SVD of `[out, *in]`, from the Gram matrix of its shorter side."""
    flat = change.reshape(len(change), -1)
    is_tall = flat.shape[0] > flat.shape[1]
    short = flat.T if is_tall else flat
    size = len(short)
    rank = min(rank, size)
    if not np.isfinite(flat).all():  # which whoever places the factors tells
        infinite = np.full((rank, *change.shape[1:]), np.inf, "float32")
        return TorchFactors(infinite, np.ones((len(change), rank), "float32"), 1.0)
    _, first = scipy.linalg.eigh(short @ short.T, subset_by_index=[size - rank, size - 1])
    second = first.T @ short
    root = np.sqrt(np.linalg.norm(second, axis=1))
    root = np.where(root > 0, root, 1)
    first, second = first * root, second / root[:, None]  # balanced
    a, b = (first.T, second.T) if is_tall else (second, first)
    with np.errstate(over="ignore"):
        a, b = a.astype("float32"), b.astype("float32")
    return TorchFactors(a.reshape(rank, *change.shape[1:]), b, 1.0)
