"""A and B of a parameter that contains the weights of several experts, as PEFT keeps them."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lora_jax.files.torch_adapters.factors import TorchFactors, common_dtype, concatenate


@dataclasses.dataclass(frozen=True)
class Experts:
    """The updates `scale · B[e] · A[e]` of a PyTorch parameter, one weight `[out, in]` per expert.

    PEFT keeps A as `[experts·rank, in]`, the rows of an expert together, and B as
    `[out, rank·experts]`, the columns of an expert `experts` apart
    (`ParamWrapper.get_delta_weight`).

    >>> one = Experts(np.ones((2, 3, 5), "f4"), np.ones((2, 4, 3), "f4"), 0.5)
    >>> one.rank, one.of(1).update().shape, [x.shape for x in one.tensors()]
    (3, (4, 5), [(6, 5), (4, 6)])
    """

    a: np.ndarray  # [experts, rank, in]
    b: np.ndarray  # [experts, out, rank]
    scale: float

    @property
    def rank(self) -> int:
        """Inner size of each expert's factors."""
        return self.a.shape[1]

    def of(self, expert: int) -> TorchFactors:
        """Return the factors of one expert."""
        return TorchFactors(self.a[expert], self.b[expert], self.scale)

    @classmethod
    def from_tensors(cls, a: np.ndarray, b: np.ndarray, rank: int, scale: float) -> "Experts":
        """Return the experts of a file's A `[experts·rank, in]` and B `[out, rank·experts]`.

        >>> a, b = np.arange(12).reshape(6, 2), np.arange(6).reshape(1, 6)
        >>> one = Experts.from_tensors(a, b, 2, 1.0)
        >>> one.a[1].tolist(), one.b[1].tolist()
        ([[4, 5], [6, 7]], [[1, 4]])
        """
        by_expert = b.reshape(len(b), rank, -1).transpose(2, 0, 1)
        return cls(a.reshape(-1, rank, a.shape[1]), by_expert, scale)

    def tensors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return A and B as PEFT's file has them."""
        a = self.a.reshape(-1, self.a.shape[2])
        return a, self.b.transpose(1, 2, 0).reshape(self.b.shape[1], -1)

    def fold(self, rank: int) -> "Experts":
        """Return the same updates with scale 1 at this rank, see `TorchFactors`."""
        experts = [self.of(e).fold().pad(rank) for e in range(len(self.a))]
        a, b = ([x.a[None] for x in experts], [x.b[None] for x in experts])
        return Experts(concatenate(a), concatenate(b), 1.0)


def stack_experts(parts: Mapping[int, TorchFactors], count: int) -> Experts:
    """Stack the factors of experts into those of one parameter, with one rank and one scale.

    Ranks are padded with zeros to the largest; different scales are multiplied into B; experts
    without factors get zeros.

    Args:
      parts: the factors by the number of the expert; at least one.
      count: the number of experts.
    """
    rank = max(part.rank for part in parts.values())
    scales = {part.scale for part in parts.values()}
    if len(scales) > 1:
        parts = {expert: part.fold() for expert, part in parts.items()}
    padded = {expert: part.pad(rank) for expert, part in parts.items()}
    first, every = next(iter(padded.values())), padded.values()
    a = np.zeros((count, *first.a.shape), common_dtype(x.a for x in every))
    b = np.zeros((count, *first.b.shape), common_dtype(x.b for x in every))
    for expert, part in padded.items():
        a[expert], b[expert] = part.a, part.b
    return Experts(a, b, scales.pop() if len(scales) == 1 else 1.0)
