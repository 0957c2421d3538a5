"""When factors that are computed are smaller than their weight, and the dtype that they get."""

import math

import numpy as np

from lora_jax.files.diffusion.weight import Fields, Shape
from lora_jax.files.torch_adapters.factors import TorchFactors

#: How many numbers factors may have that are computed for a weight that is not known: so many, or
#: so many times those in the file, so that a small file stays small.
_MOST_UNKNOWN, _TIMES = 2**21, 32


def is_low(rank: int, got: Shape, fields: Fields, shape: Shape | None) -> bool:
    """Return whether factors of this rank have fewer numbers than the weight."""
    out, ins = got[0], math.prod(got[1:])
    numbers = rank * (out + ins)
    return numbers < out * ins and (shape is not None or numbers <= most_numbers(fields))


def most_numbers(fields: Fields) -> int:
    """Return how many numbers factors may have that are computed for an unknown weight."""
    return max(_MOST_UNKNOWN, _TIMES * sum(x.size for x in fields.values()))


def rounded(a: np.ndarray, b: np.ndarray, scale: float, fields: Fields) -> TorchFactors:
    """Return computed factors in the dtype of products."""
    dtype = wide_dtype(fields)
    with np.errstate(over="ignore"):
        return TorchFactors(a.astype(dtype), b.astype(dtype), scale)


def wide_dtype(fields: Fields) -> np.dtype:
    """Return the dtype of products: float32, float64 if a factor is."""
    arrays = (x for name, x in fields.items() if name != "alpha")
    return np.dtype("float64" if any(x.dtype == np.float64 for x in arrays) else "float32")
