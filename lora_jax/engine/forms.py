"""`Forms`: which of several equal forms of the branch is computed."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Forms:
    """Choices among forms of `(x·A)·(scale·B)` that are equal but not equally fast.

    Each is made from static shapes while the program is traced. Nothing else depends on them: any
    combination gives the same numbers up to rounding.

    Args:
      share: weights that meet the same activation (q, k and v) take part in one product
        `x · [A_q | A_k | A_v]`, so the activation is read once, forward and backward.
      flatten: an activation of several leading axes takes part as one matrix `[tokens, in]`.
      rank_first: A takes part as `[rank, in]`, so that its gradient is `hᵀ·x` and not `xᵀ·h`.

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
    # Measured and left out: x·(W + A·B) where tokens outnumber the width. It was faster by 0.01 to
    # 0.03 on these shapes, makes an array of the weight's size, and loses the update in bfloat16.
    # Flattening x in the base product as well compiles to the same code.

    @classmethod
    def for_backend(cls, backend: str | None = None) -> "Forms":
        """What is measured to be fast on a backend, by default the one that JAX runs on.

        On others than the CPU the compiler is left to choose what has not been measured there.
        """
        cpu = (backend or jax.default_backend()) == "cpu"
        return cls(share=True, flatten=cpu, rank_first=cpu)


#: Every choice off: the branch as it is written.
PLAIN = Forms(share=False, flatten=False, rank_first=False)
