"""A linear probe: how much a frozen encoder's embeddings already tell a logistic regression."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Probe:
    """A logistic regression; `x @ weights + bias` is the log-odds of label 1."""

    weights: np.ndarray  # float64 [features]
    bias: float
    l2: float  # the regularization it was fitted with

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of `features` `[n, features]` on the side of their `labels` `[n]`."""
        return float(np.mean((features @ self.weights + self.bias > 0) == (labels == 1)))


def fit(features: np.ndarray, labels: np.ndarray, l2: float, steps: int = 500) -> Probe:
    """Fit a logistic regression, with the fixed Hessian bound of Böhning and Lindsay (1988).

    The objective is the mean log loss plus `l2 / 2 * |w|^2`, where `w` are the weights of
    standardized features, without the bias. The standardization is folded into the result.

    Args:
      features: `[n, features]`. A feature that (almost) never varies gets a weight of zero.
      labels: `[n]`, 0 or 1.
      l2: strength of the penalty, above zero.
      steps: maximum number of steps; fitting stops when the gradient is below 1e-6.

    Raises:
      ValueError: `l2` is not above zero, or only one label occurs.
    """
    if l2 <= 0:
        raise ValueError(f"l2 must be above zero, got {l2}")
    if len(np.unique(labels)) != 2:
        raise ValueError("a probe needs both labels, 0 and 1, in its training data")
    mean = features.mean(axis=0, dtype=np.float64)
    deviation = features.std(axis=0, dtype=np.float64)
    # Dividing dead features by their deviation would blow up rounding noise to unit size.
    alive = deviation > 1e-5 * deviation.max()
    scale = np.where(alive, 1 / np.where(alive, deviation, 1), 0)
    x = np.column_stack([(features - mean) * scale, np.ones(len(features))])
    penalty = np.append(np.full(features.shape[1], l2), 0)
    # p (1 - p) <= 1/4 bounds the Hessian everywhere, so every step decreases the loss.
    bound = np.linalg.inv(x.T @ x / (4 * len(x)) + np.diag(penalty))
    w = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        gradient = (p - labels) @ x / len(x) + penalty * w
        if np.abs(gradient).max() < 1e-6:
            break
        w -= bound @ gradient
    weights = w[:-1] * scale
    return Probe(weights, float(w[-1] - mean @ weights), l2)


def fit_best(
    features: np.ndarray,
    labels: np.ndarray,
    strengths: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    validation: float = 0.2,
) -> Probe:
    """Fit a probe, choosing its regularization on the training data.

    Each strength is evaluated on the last `validation` share of the (already shuffled) rows. The
    best one, on a tie the strongest, is then fitted to all rows.

    Args:
      features: `[n, features]`.
      labels: `[n]`, 0 or 1.
    """
    cut = len(features) - int(len(features) * validation)
    judged = {
        l2: fit(features[:cut], labels[:cut], l2).accuracy(features[cut:], labels[cut:])
        for l2 in strengths
    }
    return fit(features, labels, max(judged, key=lambda l2: (judged[l2], l2)))
