"""Norms and singular values of an update ΔW = scale · A · B, from its factors alone."""

import dataclasses

import numpy as np

#: Overflows of absurd numbers are shown as they are: inf and NaN.
_QUIET = np.errstate(over="ignore", invalid="ignore")


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The norms and singular values of one update.

    Attributes:
      norm_a, norm_b: Frobenius norms of the factors.
      singular_values: of ΔW, `[min(rank, in, out)]`, the largest first; NaN if a factor is not
        finite.
    """

    norm_a: float
    norm_b: float
    singular_values: np.ndarray

    @property
    @_QUIET
    def norm(self) -> float:
        """‖ΔW‖, its Frobenius norm: √Σσ²."""
        return float(np.linalg.norm(self.singular_values))

    @property
    def largest(self) -> float:
        """The spectral norm, the largest singular value."""
        return float(self.singular_values[0]) if self.singular_values.size else 0.0

    @property
    @_QUIET
    def stable_rank(self) -> float:
        """‖ΔW‖² / σ₁²: the number of directions as large as the largest that give this norm."""
        return (self.norm / self.largest) ** 2 if self.largest != 0 else 0.0

    @_QUIET
    def directions(self, share: float) -> int:
        """Return how few singular directions have this share of the energy Σσ²; 0 if ΔW = 0.

        >>> Spectrum(1, 1, np.array([3.0, 1.0, 0.0])).directions(0.9)
        1
        """
        energy = np.cumsum(self.singular_values**2)
        if not energy.size or not energy[-1] > 0:
            return 0
        return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1


@_QUIET
def spectrum(a: np.ndarray, b: np.ndarray, scale: float) -> Spectrum:
    """Compute norms and singular values of `scale · A · B`, A `[in, rank]` and B `[rank, out]`.

    With A = Q₁R₁ and Bᵀ = Q₂R₂ the singular values are those of the rank × rank matrix
    `scale · R₁ · R₂ᵀ`, so the update itself is never formed. Computed in float64.

    >>> found = spectrum(np.array([[3.0], [4.0]]), np.array([[0.6, 0.8]]), 2.0)
    >>> found.norm_a, found.norm_b, round(found.norm, 6), round(found.stable_rank, 6)
    (5.0, 1.0, 10.0, 1.0)
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    inner = np.array(np.nan)
    if np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(scale):
        (_, left), (_, right) = np.linalg.qr(a), np.linalg.qr(b.T)
        inner = left @ right.T
    if not np.isfinite(inner).all():
        return Spectrum(*norms, np.full(min(a.shape[0], *b.shape), np.nan))
    return Spectrum(*norms, abs(scale) * np.linalg.svd(inner, compute_uv=False))
