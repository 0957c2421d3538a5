"""What the tensors of each method mean: LoRA and LoCon, LoHa, LoKr, and whole differences.

All are exact. LoHa's product of two products of ranks r and s has rank r·s, and LoKr's Kronecker
product of two matrices the product of their ranks: where factors of that rank have fewer numbers
than the weight, these are the adapter.
"""

import dataclasses
import math

import numpy as np

from lora_jax.files.diffusion.low_rank import is_low, most_numbers, rounded, wide_dtype
from lora_jax.files.diffusion.weight import (
    Fields,
    MisfitError,
    Shape,
    Weight,
    check_shape,
    scale_of,
)
from lora_jax.files.diffusion.whole import Whole
from lora_jax.files.torch_adapters.factors import TorchFactors


def lora(fields: Fields, weight: Weight) -> TorchFactors:
    """Return the factors of LoRA and, with a Tucker core in "mid", of LoCon."""
    down, up = fields["down"], fields["up"]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down) or math.prod(up.shape[2:]) != 1:
        raise MisfitError(
            f"shapes {down.shape} and {up.shape} are not down [rank, in] and up [out, rank]"
        )
    a = down
    if "mid" in fields:
        core = fields["mid"]
        if math.prod(down.shape[2:]) != 1:
            raise MisfitError(f"lora_mid beside lora_down {down.shape}, which has a kernel")
        a = _tucker("lora_mid", core, down.reshape(down.shape[:2]), len(down), fields, weight.shape)
        a = a.astype(wide_dtype(fields))
    factors = TorchFactors(a, up.reshape(up.shape[:2]), scale_of(fields, len(down), weight))
    return _fit(factors, weight.shape)


def loha(fields: Fields, weight: Weight) -> TorchFactors | Whole:
    """Return LoHa's `(B₁·A₁) ∘ (B₂·A₂)`: its factors are the products of all pairs of columns."""
    (a1, b1), (a2, b2) = (_hadamard_pair(fields, n, weight.shape) for n in (1, 2))
    if a1.shape[1:] != a2.shape[1:] or len(b1) != len(b2):
        raise MisfitError("its two products have different shapes")
    got = (len(b1), *a1.shape[1:])
    check_shape(got, weight.shape)
    by = scale_of(fields, len(a1), weight)
    if not is_low(len(a1) * len(a2), got, fields, weight.shape):
        pair = TorchFactors(a1, b1, by), TorchFactors(a2, b2, 1.0)
        return Whole(
            "LoHa",
            len(b1),
            lambda _: (pair[0].update() * pair[1].update()).reshape(weight.shape or got),
        )
    a = (a1[:, None] * a2[None]).reshape(-1, *a1.shape[1:])
    b = (b1[:, :, None] * b2[:, None, :]).reshape(len(b1), -1)
    return _fit(rounded(a, b, by, fields), weight.shape)


def _hadamard_pair(fields: Fields, n: int, shape: Shape | None) -> tuple[np.ndarray, np.ndarray]:
    """Return A `[rank, *in]` and B `[out, rank]` of one of LoHa's two products, in float64."""
    b, a = (fields[f"hada_w{n}_{x}"].astype("float64") for x in "ab")
    shapes = f"hada_w{n}_a {b.shape} and hada_w{n}_b {a.shape} are not a product"
    if b.ndim != 2 or a.ndim < 2 or ("hada_t1" in fields) != ("hada_t2" in fields):
        raise MisfitError(shapes)
    if "hada_t1" in fields:  # with a core both have the rank first
        if a.ndim != 2:
            raise MisfitError(shapes)
        return _tucker(f"hada_t{n}", fields[f"hada_t{n}"], a, len(b), fields, shape), b.T
    if b.shape[1] != len(a):
        raise MisfitError(shapes)
    return a, b


def lokr(fields: Fields, weight: Weight) -> TorchFactors | Whole:
    """Return LoKr's `W₁ ⊗ W₂`, whose factors are the Kronecker products of theirs."""
    (a1, b1, rank1), (a2, b2, rank2) = (_kronecker_side(fields, n, weight.shape) for n in (1, 2))
    if a1.ndim != 2:
        raise MisfitError(f"lokr_w1 has inputs of shape {a1.shape[1:]}, not one axis")
    got = (len(b1) * len(b2), a1.shape[1] * a2.shape[1], *a2.shape[2:])
    check_shape(got, weight.shape)
    rank = rank1 if rank2 is None else rank2
    by = 1.0 if rank is None else scale_of(fields, rank, weight)  # of two whole matrices it is 1
    if not is_low(len(a1) * len(a2), got, fields, weight.shape):
        both = lambda: _kron(b1 @ a1, np.tensordot(b2, a2, 1))
        return Whole("LoKr", got[0], lambda _: by * both().reshape(weight.shape or got))
    return _fit(rounded(_kron(a1, a2), np.kron(b1, b2), by, fields), weight.shape)


def _kronecker_side(
    fields: Fields, n: int, shape: Shape | None
) -> tuple[np.ndarray, np.ndarray, int | None]:
    """Return A `[rank, *in]` and B `[out, rank]` of one of LoKr's matrices, in float64.

    If the matrix is stored as a whole, one of the two is the identity, and the rank of the stored
    factors, the third item, is None.
    """
    names = whole, b_name, a_name = f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b"
    there = {name: fields[name].astype("float64") for name in names if name in fields}
    core = fields.get("lokr_t2") if n == 2 else None
    shapes = ", ".join(f"{name} {x.shape}" for name, x in there.items()) or "nothing"
    if there.keys() == {whole} and core is None and there[whole].ndim >= 2:
        w = there[whole]
        ins = w.shape[1:]
        if len(w) <= math.prod(ins):
            return w, np.eye(len(w)), None
        return np.eye(math.prod(ins)).reshape(-1, *ins), w.reshape(len(w), -1), None
    if there.keys() == {a_name, b_name}:
        a, b = there[a_name], there[b_name]
        if core is not None and a.ndim == b.ndim == 2:
            return _tucker("lokr_t2", core, a, len(b), fields, shape), b.T, len(a)
        if core is None and b.ndim == 2 and a.ndim >= 2 and b.shape[1] == len(a):
            return a, b, len(a)
    raise MisfitError(f"{shapes}: {whole} is neither whole nor in two factors")


def _kron(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the Kronecker product of the first two axes; the kernel is the right one's.

    >>> _kron(np.ones((2, 3)), np.ones((4, 5, 3, 3))).shape
    (8, 15, 3, 3)
    """
    both = np.einsum("ab,cd...->acbd...", left, right)
    sizes = [x * y for x, y in zip(left.shape, right.shape, strict=False)]
    return both.reshape(*sizes, *right.shape[2:])


def whole(fields: Fields, weight: Weight) -> Whole:
    """Return the difference of two weights, LyCORIS' method "full"."""
    diff = fields["diff"]
    if not diff.ndim or diff.shape != (weight.shape or diff.shape):
        raise MisfitError(f"diff has shape {diff.shape}, but the base's weight has {weight.shape}")
    return Whole("a whole difference", len(diff), lambda _: diff.astype("float64"))


def _tucker(
    name: str, core: np.ndarray, ins: np.ndarray, outs: int, fields: Fields, shape: Shape | None
) -> np.ndarray:
    """Return A `[outs, in, *kernel]` of a core `[outs, rank, *kernel]` and `[rank, in]`.

    What cannot fit the weight is refused before anything is allocated.
    """
    if core.ndim < 3 or core.shape[:2] != (outs, len(ins)):
        raise MisfitError(f"{name} has shape {core.shape}, not [{outs}, {len(ins)}, *kernel]")
    width, kernel = ins.shape[1], core.shape[2:]
    numbers = outs * width * math.prod(kernel)
    if shape is not None and (width > shape[1] or kernel != shape[2:]):
        raise MisfitError(f"{name} has the kernel {kernel} and {width} inputs, the base {shape}")
    if shape is None and numbers > most_numbers(fields):
        raise MisfitError(f"{name} {core.shape} and {width} inputs give {numbers:,} numbers")
    return np.einsum("ij...,jr->ir...", core.astype("float64"), ins.astype("float64"))


def _fit(factors: TorchFactors, shape: Shape | None) -> TorchFactors:
    """Return factors whose A has the weight's in axes."""
    check_shape((factors.outputs, *factors.a.shape[1:]), shape)
    if shape is None:
        return factors
    return dataclasses.replace(factors, a=factors.a.reshape(-1, *shape[1:]))
