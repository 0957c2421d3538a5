"""`Forms`: which of several equivalent forms of the branch to compute."""

import dataclasses
from typing import Any, Literal

import jax

from lora_jax.core.sharding.meshes import is_on_mesh, platform_of


@dataclasses.dataclass(frozen=True)
class Forms:
    """Choices among forms of `(x·A)·(scale·B)` that are equal but not equally fast.

    They are made from static shapes, dtypes and places while the program is traced. Any combination
    gives the same numbers up to rounding; `narrow` changes which sum is rounded, and only where the
    program computes in 16 bits.

    Args:
      share: multiply an activation that several weights meet (q, k and v) with all their A at once,
        `x · [A_q | A_k | A_v]`, so that it is read once, forward and backward.
      flatten: multiply an activation with several leading axes as one matrix `[tokens, in]`.
      rank_first: lay A out as `[rank, in]`, so that its gradient is `hᵀ·x` and not `xᵀ·h`.
      narrow: return products of 16-bit operands in 16 bits. They are accumulated in float32 and
        rounded once all the same. The sum is in 16 bits, so that a GPU adds it in the epilogue of
        the base product (before that one is rounded), and the products of the gradients read
        16-bit operands and not copies in float32.
      apart: keep the branch's products apart from the base's: XLA would compute `x·[W | A]` on a
        copy of W.
      tie: what keeps a quantized weight from being dequantized before its activation is there, and
        so all of them at once: "data", a zero that is computed from the activation and added to the
        codes; "barrier", an optimization barrier around both; None, nothing.

    >>> Forms.for_backend("cpu").rank_first, Forms.for_backend("gpu").rank_first
    (True, False)
    """

    # Measured: time over that of the frozen model, two CPU cores, 512 tokens, width 512, rank 8,
    # float32.
    #                          off   on
    share: bool = True  #      1.20  1.12   q, k and v of 512 × 512 with their gradients
    flatten: bool = True  #    1.84  1.11   a whole training step: XLA's CPU backend contracts
    #                                       two token axes by a slow path
    rank_first: bool = True  # 1.31  1.17   one weight of 512 × 512: a product that contracts the
    #                                       leading axis of a wide matrix is four times as slow
    narrow: bool = False
    apart: bool = False
    tie: Literal["data", "barrier"] | None = "data"
    # Measured: one H200, 4 such blocks, NF4, time over the bfloat16 base's and MB of temporary
    # memory (the base's: 9889): "data" 1.047 and 9889, "barrier" 1.048 and 9889, None 1.023 and
    # 11103, because the forward pass keeps values for the backward pass. A TPU v5e, compiled:
    # "barrier" 525 MB, "data" 549, None 623. XLA's CPU backend drops barriers early: 8 layers of
    # width 512 in one function, int8, take 13.7 MB with "data" and 90.7 otherwise (float: 10.0).
    # Derived: MB that the kernels of a step read and write above the frozen blocks' 4221, compiled
    # for an H100 without one (jax 0.10.2, cuBLAS), 1 block of width 4096, ffn 11008, 4096 tokens,
    # bfloat16, rank 16; as `python -m benchmarks.accelerator` defines it.
    #   all off 7091, share 6703, narrow 2938, narrow + apart 1541 (rank 8: 1513, rank 64: 1710),
    #   narrow + apart + share 1450 with 14 kernels more, + flatten 1541, + rank_first 1556
    #   by hand, the sum in bfloat16 2938, in float32 7057
    # The same for one TPU v5e, without attention: MB that XLA counts for the whole step (MB of
    # temporary memory): all off 7617 (535), share 7205 (534), narrow 7225 (444), narrow + share
    # 7223 (444), narrow + apart 7202 (669). A TPU adds in float32 within the second product's
    # kernel, so only `share` is worth its while there.
    # Derived: bytes that four scanned layers of Llama 3 8B send over tensor=8 beyond the frozen
    # ones, H100: narrow + apart 0.441 GB, + share 0.038 GB. So on a mesh products are shared.
    # Measured on an H200, 4 such blocks, over the frozen blocks: share 1.187, all off 1.157. So a
    # GPU does not get `share`, whose additional kernels cost more than the bytes that they save.
    #
    # A batch whose rows use N adapters: A and B are gathered per row. Measured, time of the branch
    # over that, two CPU cores, width 256 to 2048, rank 4 to 64, float32, forward, rows × tokens:
    #   N                                              2             8             64
    #   x·[A_1 | ... | A_N], masked    64 × 1      0.03 to 0.30  0.10 to 0.89  1.4 to 1.7
    #                                   8 × 1      0.32 to 1.25  0.62 to 4.9   0.33 to 17
    #                                   8 × 16     0.68 to 1.2   1.2 to 10     4.7 to 24
    #   sorted, then ragged products   64 × 1      0.01 to 0.47  0.10 to 0.98  8 to 74
    #                                   8 × 1      0.36 to 0.97  0.80 to 1.5   1.3 to 24
    #                                   8 × 16     1.0 to 3.8    1.0 to 5.3    20 to 270
    # Sorting is faster than gathering only where the mask is faster too, and by less; the mask only
    # where half the rows or fewer are as many as the slots, with one token each.
    # Without a gather (rows in the order of the slots) a decoding step of 8 rows with 8 adapters of
    # rank 16 on all products of 12 layers of SmolLM2's size takes 1.10 of that with one adapter;
    # 1.24 with the scale on every row's B in place of x·A, and about twice as much with q, k and v
    # sharing x·[A_q | A_k | A_v], which copies every A. So they share where a row has more tokens
    # than that costs.
    #
    # Measured and left out: x·(W + A·B) where tokens outnumber the width. It was faster by 0.01 to
    # 0.03 on these shapes, makes an array of the weight's size, and loses the update in bfloat16.
    # Flattening x in the base product as well compiles to the same code. [x | h]·[W ; B] copies W
    # and x on a GPU: 67 MB more per product of 4096 × 4096 than `narrow` and `apart`.

    @classmethod
    def for_backend(cls, backend: str | None = None) -> "Forms":
        """Return what is fast on a backend, by default JAX's default backend.

        `backend` is "cpu", "tpu", "gpu", "cuda" or "rocm". Where an array is on a mesh of several
        devices, its products are neither flattened nor taken rank first, whatever is chosen here:
        reshaping an axis that is sharded may gather it.
        """
        backend = backend or jax.default_backend()
        if backend in ("gpu", "cuda", "rocm"):
            return cls(
                share=False, flatten=False, rank_first=False, narrow=True, apart=True, tie="barrier"
            )
        cpu = backend == "cpu"
        return cls(share=True, flatten=cpu, rank_first=cpu, tie="data" if cpu else "barrier")

    @classmethod
    def for_arrays(cls, arrays: Any) -> "Forms":
        """Return what is fast where a tree's arrays lie, by default on JAX's default backend.

        On a mesh of several devices products are shared, whatever is fast on one. Under `jit` an
        array's type names the mesh that it was placed on, if any.
        """
        found = [x for x in jax.tree.leaves(arrays) if isinstance(x, jax.Array)]
        forms = cls.for_backend(next(filter(None, map(platform_of, found)), None))
        # Where q, k and v are sharded, each one's part of dx is a partial sum. XLA adds the three
        # before one all-reduce only if the branch's part is added once, after them.
        return dataclasses.replace(forms, share=True) if any(map(is_on_mesh, found)) else forms


#: Every choice off: the branch as one would write it.
PLAIN = Forms(share=False, flatten=False, rank_first=False)
