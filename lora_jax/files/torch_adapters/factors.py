"""A and B of one torch module, with torch's axes, and their joining and cutting."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class TorchFactors:
    """The update `scale · B · A` of one torch module, the weight seen as `[out, *in]`.

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
        """`scale · B · A`, `[out, *in]`, in float64."""
        return self.scale * np.tensordot(self.b.astype("float64"), self.a.astype("float64"), 1)

    def cut(self, start: int, stop: int) -> "TorchFactors":
        """The outputs from `start` to `stop`."""
        magnitude = None if self.magnitude is None else self.magnitude[start:stop]
        return dataclasses.replace(self, b=self.b[start:stop], magnitude=magnitude)

    def pad(self, rank: int) -> "TorchFactors":
        """The same update at a higher rank: rows of A and columns of B that are zero."""
        more = rank - self.rank
        a = np.pad(self.a, [(0, more), *[(0, 0)] * (self.a.ndim - 1)])
        return dataclasses.replace(self, a=a, b=np.pad(self.b, [(0, 0), (0, more)]))

    def select(self, keep: np.ndarray) -> "TorchFactors":
        """The components where `keep` is true; all of them where it is true nowhere."""
        if keep.all() or not keep.any():
            return self
        return dataclasses.replace(self, a=self.a[keep], b=self.b[:, keep])

    def drop_padding(self) -> "TorchFactors":
        """Without components that are zero in A and in B alike: the same update, never trained."""
        return self.select(_used(self.a) | _used(self.b.T))

    def drop_unused(self) -> "TorchFactors":
        """Without components that are zero in B, if any is not."""
        return self.select(_used(self.b.T))

    def fold(self) -> "TorchFactors":
        """Scale 1, what it was being multiplied into B (in float64, rounded once)."""
        b = (self.b.astype("float64") * self.scale).astype(self.b.dtype)
        return dataclasses.replace(self, b=b, scale=1.0)


def _used(rows: np.ndarray) -> np.ndarray:
    return (rows != 0).reshape(len(rows), -1).any(1)


def join(parts: Sequence[TorchFactors | None], widths: Sequence[int]) -> TorchFactors | None:
    """The factors of modules that read the same input, as those of one with all their outputs.

    Exact: the A's one behind another, the B's on a diagonal of blocks, so the ranks add up. Parts
    that share one A (the outputs of one fused module) share it again. A part that is None has a
    zero block. Scales that differ are multiplied into B.

    Args:
      parts: factors of each, or None.
      widths: the number of outputs of each.

    Raises:
      ValueError: one part has a magnitude and another has none.

    >>> one = TorchFactors(np.ones((2, 3), "float32"), np.ones((4, 2), "float32"), 0.5)
    >>> other = dataclasses.replace(one, a=2 * one.a)
    >>> join([one, None, other], [4, 4, 4]).b.shape, join([one, one], [4, 4]).b.shape
    ((12, 4), (8, 2))
    """
    there = [part for part in parts if part is not None]
    if not there or len(parts) == 1:
        return there[0] if there else None
    with_magnitude = [part is not None and part.magnitude is not None for part in parts]
    if any(with_magnitude) and not all(with_magnitude):
        raise ValueError("DoRA on a part of what is joined")
    if len({part.scale for part in there}) > 1:
        there = [part.fold() for part in there]
        folded = iter(there)
        parts = [None if part is None else next(folded) for part in parts]
    groups = _same_a(there)
    starts = dict(zip(groups, np.cumsum([0, *(x.rank for x in groups.values())]), strict=False))
    dtype = np.result_type(*(part.b.dtype for part in there))
    b = np.zeros((sum(widths), sum(x.rank for x in groups.values())), dtype)
    for part, stop, width in zip(parts, np.cumsum(widths), widths, strict=True):
        if part is not None:
            at = starts[_key(part)]
            b[stop - width : stop, at : at + part.rank] = part.b
    magnitudes = [x.magnitude for x in there if x.magnitude is not None]
    return TorchFactors(
        np.concatenate([part.a for part in groups.values()]),
        b,
        there[0].scale,
        np.concatenate(magnitudes) if magnitudes else None,
    )


def _key(part: TorchFactors) -> tuple:
    return part.a.dtype, part.a.shape, part.a.tobytes()


def _same_a(parts: Sequence[TorchFactors]) -> dict[tuple, TorchFactors]:
    """The first of the parts with each A."""
    found: dict[tuple, TorchFactors] = {}
    for part in parts:
        found.setdefault(_key(part), part)
    return found
