"""A and B of one PyTorch module, with PyTorch's axes, and how to join and cut them."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np


@dataclasses.dataclass(frozen=True)
class TorchFactors:
    """The update `scale · B · A` of one PyTorch module, whose weight is seen as `[out, *in]`.

    >>> one = TorchFactors(np.ones((2, 3), "float32"), np.ones((4, 2), "float32"), 0.5)
    >>> one.rank, one.outputs, one.update().shape
    (2, 4, (4, 3))
    """

    a: np.ndarray  # [rank, *in]
    b: np.ndarray  # [out, rank]
    scale: float
    magnitude: np.ndarray | None = None  # [out], with DoRA

    @property
    def rank(self) -> int:
        """Inner size of the factors."""
        return self.a.shape[0]

    @property
    def outputs(self) -> int:
        """How many outputs the module has."""
        return self.b.shape[0]

    def update(self) -> np.ndarray:
        """Compute `scale · B · A`, `[out, *in]`, in float64."""
        return self.scale * np.tensordot(self.b.astype("float64"), self.a.astype("float64"), 1)

    def cut(self, start: int, stop: int) -> "TorchFactors":
        """Return the factors of the outputs from `start` to `stop`."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return dataclasses.replace(self, b=self.b[start:stop], magnitude=magnitude)

    def pad(self, rank: int) -> "TorchFactors":
        """Return the same update at a higher rank, by zero rows of A and zero columns of B."""
        more = rank - self.rank
        a = np.pad(self.a, [(0, more), *[(0, 0)] * (self.a.ndim - 1)])
        return dataclasses.replace(self, a=a, b=np.pad(self.b, [(0, 0), (0, more)]))

    def select(self, keep: np.ndarray) -> "TorchFactors":
        """Return the components where `keep` is true, or all of them if it is true nowhere."""
        if keep.all() or not keep.any():
            return self
        return dataclasses.replace(self, a=self.a[keep], b=self.b[:, keep])

    def drop_padding(self) -> "TorchFactors":
        """Drop components that are zero in both A and B, which never train."""
        return self.select(_is_used(self.a) | _is_used(self.b.T))

    def drop_unused(self) -> "TorchFactors":
        """Drop components that are zero in B, unless all are."""
        return self.select(_is_used(self.b.T))

    def fold(self) -> "TorchFactors":
        """Multiply the scale into B (in float64, rounded once), so that it becomes 1.

        Where B's dtype cannot hold the product (it overflows, or is so small that digits are lost),
        A takes a part of the scale, a power of two. Where that does not help either, both become
        float32; values beyond float32 become infinite, see `find_unloadable`.

        >>> one = TorchFactors(np.ones((1, 1), "f2"), np.full((1, 1), 3e4, "f2"), 8.0)
        >>> folded = one.fold()
        >>> folded.a.item() * folded.b.item(), folded.b.dtype
        (240000.0, dtype('float16'))
        """
        for shift in (0, self._balance()):
            a = self.a.astype("float64") * 2.0**shift
            b = self.b.astype("float64") * (self.scale * 2.0**-shift)
            if _holds(self.a.dtype, a) and _holds(self.b.dtype, b):
                return self._replace(a.astype(self.a.dtype), b.astype(self.b.dtype))
        wide = common_dtype([self.a, self.b], np.dtype("float32"))
        with np.errstate(over="ignore"):
            return self._replace(a.astype(wide), b.astype(wide))

    def _replace(self, a: np.ndarray, b: np.ndarray) -> "TorchFactors":
        return dataclasses.replace(self, a=a, b=b, scale=1.0)

    def _balance(self) -> int:
        """Return how many powers of two of `scale · B` make A's largest value as large as B's."""
        a, b = (float(abs(x.astype("float64")).max(initial=0)) for x in (self.a, self.b))
        b *= abs(self.scale)
        return round((math.log2(b) - math.log2(a)) / 2) if a > 0 and 0 < b < math.inf else 0


def common_dtype(arrays: Iterable[np.ndarray], *more: Any) -> Any:
    """Return the dtype that holds the values of all these arrays, which have floating dtypes.

    >>> common_dtype([np.ones(1, "float16"), np.ones(1, ml_dtypes.bfloat16)])
    dtype('float32')
    """
    dtypes = {*(np.dtype(x.dtype) for x in arrays), *more}
    if len(dtypes) == 1:
        return dtypes.pop()
    return np.dtype("float64" if np.dtype("float64") in dtypes else "float32")


def concatenate(arrays: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
    """Concatenate arrays of floating dtypes, also of those that numpy cannot promote.

    One array is returned as it is: a scalar that is fully trained has no axis.
    """
    if len(arrays) == 1:
        return arrays[0]
    dtype = common_dtype(arrays)
    return np.concatenate([x.astype(dtype) for x in arrays], axis)


def _holds(dtype: Any, x: np.ndarray) -> bool:
    """Return whether the dtype holds these float64 values to its own precision, as a whole."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.linalg.norm(x.astype(dtype).astype("float64") - x)
    return bool(error <= float(ml_dtypes.finfo(dtype).eps) * np.linalg.norm(x))


def _is_used(rows: np.ndarray) -> np.ndarray:
    return (rows != 0).reshape(len(rows), -1).any(1)


def join_factors(
    parts: Sequence[TorchFactors | None], widths: Sequence[int]
) -> TorchFactors | None:
    """Join the factors of modules with the same input into those of one with all their outputs.

    This is exact: the A's are stacked and the B's become diagonal blocks, so the ranks add up.
    Parts that share one A (the outputs of one fused module) share it in the result. A part that is
    None has a zero block. Different scales are multiplied into B.

    Args:
      parts: the factors of each module, or None.
      widths: the number of outputs of each module.

    Raises:
      ValueError: only some parts have a magnitude.

    >>> one = TorchFactors(np.ones((2, 3), "float32"), np.ones((4, 2), "float32"), 0.5)
    >>> other = dataclasses.replace(one, a=2 * one.a)
    >>> joined = join_factors([one, None, other], [4, 4, 4])
    >>> joined.b.shape, join_factors([one, one], [4, 4]).b.shape
    ((12, 4), (8, 2))
    """
    there = [part for part in parts if part is not None]
    if not there or len(parts) == 1:
        return there[0] if there else None
    with_magnitude = [part is not None and part.magnitude is not None for part in parts]
    if any(with_magnitude) and not all(with_magnitude):
        raise ValueError("only some of the joined modules have DoRA")
    if len({part.scale for part in there}) > 1:
        there = [part.fold() for part in there]
        folded = iter(there)
        parts = [None if part is None else next(folded) for part in parts]
    groups = _same_a(there)
    starts = dict(zip(groups, np.cumsum([0, *(x.rank for x in groups.values())]), strict=False))
    dtype = common_dtype(part.b for part in there)
    b = np.zeros((sum(widths), sum(x.rank for x in groups.values())), dtype)
    for part, stop, width in zip(parts, np.cumsum(widths), widths, strict=True):
        if part is not None:
            at = starts[_key(part)]
            b[stop - width : stop, at : at + part.rank] = part.b
    magnitudes = [x.magnitude for x in there if x.magnitude is not None]
    return TorchFactors(
        concatenate([part.a for part in groups.values()]),
        b,
        there[0].scale,
        concatenate(magnitudes) if magnitudes else None,
    )


def _key(part: TorchFactors) -> tuple:
    return part.a.dtype, part.a.shape, part.a.tobytes()


def _same_a(parts: Sequence[TorchFactors]) -> dict[tuple, TorchFactors]:
    """Return the first part with each distinct A."""
    found: dict[tuple, TorchFactors] = {}
    for part in parts:
        found.setdefault(_key(part), part)
    return found
