"""What is known of the weight that one module of a file changes."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Fields = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


class MisfitError(Exception):
    """The shapes of a module's tensors do not fit each other, or the weight."""


class Weight(NamedTuple):
    """A weight of the base, as far as it is known.

    Attributes:
      shape: in PyTorch, `[out, *in]`; None if it is not known.
      scale: what multiplies the product where the file has no alpha; None for 1.
      value: returns its numbers, or None where the base has none.
    """

    shape: Shape | None = None
    scale: float | None = None
    value: Callable[[], np.ndarray | None] = lambda: None


def scale_of(fields: Fields, rank: int, weight: Weight) -> float:
    """Return alpha over the rank, or the scale of the weight where the file has no alpha."""
    if "alpha" in fields:
        return float(fields["alpha"].reshape(())) / rank
    return 1.0 if weight.scale is None else weight.scale


def check_shape(got: Shape, shape: Shape | None) -> None:
    """Raise where the weight has another shape.

    A kernel of ones may be left out, and a kernel's axes may be one with the inputs.

    Raises:
      MisfitError: it has; both shapes are named.
    """
    if shape is None:
        return
    ones = math.prod(got[2:]) == math.prod(shape[2:]) == 1
    is_flat = len(got) == 2 and got[1] == math.prod(shape[1:])
    if got != shape and not (got[0] == shape[0] and (is_flat or (ones and got[1] == shape[1]))):
        raise MisfitError(f"is for a weight of shape {got}, but the base's is {shape}")
