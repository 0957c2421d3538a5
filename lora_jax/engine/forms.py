"""`Forms`: which of several equivalent forms of the branch to compute."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Forms:
    """Choices among forms of `(x·A)·(scale·B)` that are equal but not equally fast.

    They are made from static shapes while the program is traced. Any combination gives the same
    numbers up to rounding.

    Args:
      share: multiply an activation that several weights meet (q, k and v) with all their A at once,
        `x · [A_q | A_k | A_v]`, so that it is read once, forward and backward.
      flatten: multiply an activation with several leading axes as one matrix `[tokens, in]`.
      rank_first: lay A out as `[rank, in]`, so that its gradient is `hᵀ·x` and not `xᵀ·h`.

    >>> Forms.for_backend("cpu").rank_first, Forms.for_backend("gpu").rank_first
    (True, False)
    """

    # Time over that of the frozen model, two CPU cores, 512 tokens, width 512, rank 8, float32.
    #                          off   on
    share: bool = True  #      1.20  1.12   q, k and v of 512 × 512 with their gradients
    flatten: bool = True  #    1.84  1.11   a whole training step: XLA's CPU backend contracts
    #                                       two token axes by a slow path
    rank_first: bool = True  # 1.31  1.17   one weight of 512 × 512: a product that contracts the
    #                                       leading axis of a wide matrix is four times as slow
    narrow: bool = False
    apart: bool = False
    # Measured and left out: x·(W + A·B) where tokens outnumber the width. It was faster by 0.01 to
    # 0.03 on these shapes, makes an array of the weight's size, and loses the update in bfloat16.
    # Flattening x in the base product as well compiles to the same code.

    @classmethod
    def for_backend(cls, backend: str | None = None) -> "Forms":
        """Return what was measured to be fast on a backend, by default JAX's default backend.

        On other backends than the CPU, what was not measured is left to the compiler.
        """
        cpu = (backend or jax.default_backend()) == "cpu"
        return cls(share=True, flatten=cpu, rank_first=cpu)


#: Every choice off: the branch as one would write it.
PLAIN = Forms(share=False, flatten=False, rank_first=False)
