"""Changes that are functions of the base's weight: IA³, OFT, BOFT and GLoRA of LyCORIS.

IA³ multiplies each output or input, OFT and BOFT rotate the outputs, and GLoRA adds `W·A + B`, two
products of low rank.
"""

import math

import numpy as np

from lora_jax.files.diffusion.low_rank import is_low, rounded
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


def ia3(fields: Fields, weight: Weight) -> Whole:
    """Return IA³'s `W · w` by outputs, or by inputs where `on_input` is 1."""
    gains, flag = fields["ia3"], float(fields["on_input"].reshape(()))
    sizes = [size for size in gains.shape if size != 1]
    if flag not in (0, 1) or len(sizes) > 1 or gains.ndim < 1:
        raise MisfitError(f"weight {gains.shape} and on_input {flag:g} are not of IA³")
    axis = int(flag)
    if weight.shape is not None and gains.size != weight.shape[axis]:
        side = ("outputs", "inputs")[axis]
        raise MisfitError(f"has {gains.size} gains of {side}, but the base's is {weight.shape}")
    outputs = weight.shape[0] if weight.shape else gains.size

    def change(base: np.ndarray) -> np.ndarray:
        shape = [-1 if i == axis else 1 for i in range(base.ndim)]
        return base * gains.astype("float64").reshape(shape)

    return Whole("IA³", outputs, change, of_base=True)


def oft(fields: Fields, weight: Weight) -> Whole:
    """Return the change by OFT's rotations `[blocks, n, n]` of n outputs, or BOFT's stages of them.

    Each is the Cayley transform of a skew matrix, whose norm alpha limits; `rescale` multiplies
    the outputs.
    """
    blocks = fields["oft_blocks"]
    if blocks.ndim not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise MisfitError(f"oft_blocks has shape {blocks.shape}, not [blocks, n, n]")
    is_butterfly = blocks.ndim == 4
    *stages, count, size = blocks.shape[:-1]
    out = count * size
    if is_butterfly and (size % 2 or out % (size * 2 ** (stages[0] - 1))):
        raise MisfitError(f"oft_blocks {blocks.shape} are not stages of a butterfly")
    if weight.shape is not None and weight.shape[0] != out:
        raise MisfitError(f"oft_blocks turn {out} outputs, but the base's is {weight.shape}")
    gains = fields.get("rescale")
    if gains is not None and (gains.shape[:1] != (out,) or gains.size != out):
        raise MisfitError(f"rescale has shape {gains.shape}, not [{out}, ...]")
    limit = float(fields["alpha"].reshape(())) * out if "alpha" in fields else 0.0

    def change(base: np.ndarray) -> np.ndarray:
        turns = _rotations(blocks.astype("float64"), limit)
        flat = base.reshape(out, -1)
        new = _butterfly(turns, flat) if is_butterfly else _turned(turns, flat)
        if gains is not None:
            new = new * gains.astype("float64").reshape(out, 1)
        return new.reshape(base.shape) - base

    return Whole("BOFT" if is_butterfly else "OFT", out, change, of_base=True)


def _rotations(blocks: np.ndarray, limit: float) -> np.ndarray:
    """Return `(I + Q)·(I - Q)⁻¹` of the skew parts Q, which have no larger norm than the limit."""
    skew = blocks - np.swapaxes(blocks, -1, -2)
    norm = np.linalg.norm(skew) + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    one = np.eye(blocks.shape[-1])
    return np.linalg.solve(one - skew, one + skew)


def _turned(turns: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Return each block of rows, multiplied by the transpose of its rotation."""
    count, size = turns.shape[:2]
    return np.einsum("knm,knj->kmj", turns, flat.reshape(count, size, -1)).reshape(flat.shape)


def _butterfly(turns: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """Return rows multiplied by stages of rotations; each stage mixes rows farther apart."""
    size = turns.shape[-1]
    for i, stage in enumerate(turns):
        near = 2**i * size // 2
        paired = flat.reshape(-1, 2, near, flat.shape[1]).swapaxes(1, 2)
        new = np.einsum("kij,kjc->kic", stage, paired.reshape(-1, size, flat.shape[1]))
        flat = new.reshape(-1, near, 2, flat.shape[1]).swapaxes(1, 2).reshape(flat.shape)
    return flat


def glora(fields: Fields, weight: Weight) -> TorchFactors | Whole:
    """Return GLoRA's `W·a1·a2 + b1·b2`: factors of both products, where the base has values."""
    a1, a2, b1, b2 = (fields[name] for name in ("a1", "a2", "b1", "b2"))
    shapes = ", ".join(f"{name} {fields[name].shape}" for name in ("a1", "a2", "b1", "b2"))
    flat = all(x.ndim >= 2 and math.prod(x.shape[2:]) == 1 for x in (a1, a2, b1))
    if not flat or b2.ndim < 2 or not len(a2) == a1.shape[1] == len(b2) == b1.shape[1]:
        raise MisfitError(f"{shapes} are not two products")
    got: Shape = (len(b1), *b2.shape[1:])
    check_shape(got, weight.shape)
    if not len(a1) == a2.shape[1] == got[1]:
        raise MisfitError(f"{shapes} are for other numbers of inputs")
    a1, a2, b1 = (x.reshape(x.shape[:2]).astype("float64") for x in (a1, a2, b1))
    scale = scale_of(fields, len(b2), weight)
    whole = _glora_whole(fields, scale, a1 @ a2)
    base = weight.value()
    if base is None or not is_low(_glora_rank(a2, got), got, fields, weight.shape):
        return whole
    kernel = got[2:]
    spread = np.eye(math.prod(kernel)).reshape(*kernel, -1)  # one component for each of its places
    a = np.einsum("jc,...p->jpc...", a2, spread).reshape(-1, *got[1:])
    b = np.einsum("oip,ij->ojp", base.reshape(*got[:2], -1).astype("float64"), a1)
    a = np.concatenate([a, b2.astype("float64")])
    b = np.concatenate([b.reshape(len(b), -1), b1], 1)
    return rounded(a.reshape(-1, *base.shape[1:]), b, scale, fields)


def _glora_rank(a2: np.ndarray, shape: Shape) -> int:
    return len(a2) * (math.prod(shape[2:]) + 1)


def _glora_whole(fields: Fields, scale: float, inner: np.ndarray) -> Whole:
    b1, b2 = (fields[name].astype("float64") for name in ("b1", "b2"))

    def change(base: np.ndarray) -> np.ndarray:
        added = np.tensordot(b1.reshape(b1.shape[:2]), b2, 1).reshape(base.shape)
        return scale * (np.einsum("oi...,ij->oj...", base, inner) + added)

    return Whole("GLoRA", len(b1), change, of_base=True)
