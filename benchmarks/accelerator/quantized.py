"""A quantized base: training steps, decoding, dequantization alone, and native narrow products."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

import lora_jax
from benchmarks.accelerator import blocks
from benchmarks.accelerator.blocks import Contender, Setting
from benchmarks.accelerator.in_turn import InTurn
from benchmarks.accelerator.size import Size
from benchmarks.accelerator.timing import seconds_per_call
from lora_jax.core.quantized.kinds import WRITABLE
from lora_jax.core.quantized.nf4 import VALUES
from lora_jax.core.quantized.weight import QuantizedWeight, quantize_array

Row = tuple[str, Callable[[], dict[str, Any]]]
#: The kinds that are measured, where the table of kinds has them.
MEASURED = tuple(
    kind
    for kind in ("nf4", "int8", "int4", "fp8", "int8_block", "mxfp4", "q8_0", "q4_1", "q4_k")
    if kind in WRITABLE
)
#: Those of them whose training steps are timed: a compilation each.
TRAINED = tuple(kind for kind in MEASURED if kind in ("nf4", "int8", "int4", "fp8", "q4_k"))
TIES: tuple[Literal["data", "barrier"] | None, ...] = ("data", "barrier", None)


def steps(setting: Setting, kinds: tuple[str, ...], again: bool = False) -> Iterator[Row]:
    """Return a training step with each base, timed in turn; `again`, the bfloat16 base twice."""
    makes = {"bfloat16 base": partial(blocks.lora, setting)}
    makes |= {kind: partial(blocks.lora, setting, kind=kind) for kind in kinds}
    if again:
        makes["bfloat16 base again"] = partial(blocks.lora, setting)
    yield from InTurn(setting.size, makes).rows()


def ties(setting: Setting, kinds: tuple[str, ...]) -> Iterator[Row]:
    """Return a training step with each way to make dequantization wait."""
    makes = {"bfloat16 base": partial(blocks.lora, setting)}
    for kind in kinds:
        for tie in TIES:
            forms = dataclasses.replace(lora_jax.Forms.for_backend(), tie=tie)
            makes[f"{kind}, tie {tie}"] = partial(blocks.lora, setting, forms, kind=kind)
    yield from InTurn(setting.size, makes).rows()


def decoding(setting: Setting, kinds: tuple[str, ...]) -> Iterator[Row]:
    """Return the blocks' forward pass on one token, without attention to others."""
    size = dataclasses.replace(setting.size, batch=1, time=1, steps=4 * setting.size.steps)
    setting = dataclasses.replace(setting, size=size)

    def make(kind: str | None) -> Contender:
        trained = blocks.lora(setting, kind=kind)
        adapted = lora_jax.lora(setting.loss)

        def start() -> tuple:
            (adapters, _), base, x = trained.start()
            return x, lora_jax.join(base, adapters)

        return Contender(trained.name, lambda x, params: (x, adapted(params, x)), start)

    makes = {"bfloat16 base": partial(make, None)}
    makes |= {kind: partial(make, kind) for kind in kinds}
    yield from InTurn(size, makes).rows()


def dequantization(size: Size, kinds: tuple[str, ...]) -> Iterator[Row]:
    """Return the dequantization of one `[width, ffn]` weight, beside a copy of its values."""
    yield "copy of the bfloat16 values", partial(_time_copy, size)
    for kind in kinds:
        yield kind, partial(_time_values, size, kind, QuantizedWeight.dequantize)
    for name, look_up in _LOOK_UPS.items():
        yield f"nf4, {name}", partial(_time_values, size, "nf4", partial(_values_by, look_up))


def _weight(size: Size) -> jax.Array:
    drawn = jax.random.normal(jax.random.key(0), (size.width, size.ffn), jnp.float32)
    return (drawn * size.width**-0.5).astype(size.dtype)


def _rate(size: Size, run: Callable, x: Any) -> dict[str, Any]:
    compiled = jax.jit(run).lower(x).compile()
    seconds = seconds_per_call(lambda: compiled(x), size.repeats, 8 * size.steps)
    moved = sum(leaf.nbytes for leaf in jax.tree.leaves((x, compiled(x))))
    return {"us": 1e6 * seconds, "GB_per_second": moved / seconds / 1e9}


def _time_copy(size: Size) -> dict[str, Any]:
    return _rate(size, lambda w: -w, _weight(size))  # XLA would give a true copy back as it is


def _time_values(size: Size, kind: str, values: Callable) -> dict[str, Any]:
    quantize = jax.jit(lambda w: quantize_array(w, kind, -2))
    return _rate(size, values, quantize(_weight(size)))


def _values_by(look_up: Callable[[jax.Array], jax.Array], w: QuantizedWeight) -> jax.Array:
    """Return the values of an NF4 weight, with another way to look them up."""
    fields, (rows, columns) = w.fields, w.shape
    codes = fields["codes"].reshape(-1, w.block // 2, columns)
    halves = look_up(codes)
    absmax = jnp.square(fields["scales"].astype(jnp.float32)) * (fields["largest"] / 255**2)
    return (halves * absmax[:, None]).reshape(rows, columns).astype(w.dtype)


def _gather(codes: jax.Array) -> jax.Array:
    table = jnp.array(VALUES, jnp.float32)
    take = lambda c: table.at[c].get(mode="promise_in_bounds")
    return jnp.concatenate([take(codes & jnp.uint8(15)), take(codes >> jnp.uint8(4))], 1)


def _gather_pairs(codes: jax.Array) -> jax.Array:
    table = jnp.array([(low, high) for high in VALUES for low in VALUES], jnp.float32)
    pairs = table.at[codes].get(mode="promise_in_bounds")
    return jnp.moveaxis(pairs, -1, 1).reshape(codes.shape[0], -1, codes.shape[-1])


def _sum_of_steps(codes: jax.Array) -> jax.Array:
    """Return the first value plus the steps up to the code, by comparisons."""

    def one(c: jax.Array) -> jax.Array:
        total = jnp.full(c.shape, VALUES[0], jnp.float32)
        for code in range(1, 16):
            total = jnp.where(c >= code, jnp.float32(VALUES[code]), total)
        return total

    return jnp.concatenate([one(codes & jnp.uint8(15)), one(codes >> jnp.uint8(4))], 1)


_LOOK_UPS = {
    "a gather per weight": _gather,
    "a gather per byte": _gather_pairs,
    "15 selects in a row": _sum_of_steps,
}


def native_products(size: Size) -> Iterator[Row]:
    """Return `x·W` of `[tokens, width]` and `[width, ffn]`, and its error beside float32."""
    for name, make in _PRODUCTS.items():
        yield name, partial(_time_product, size, make)
    for kind in MEASURED:
        yield f"dequantize {kind}, multiply", partial(_time_product, size, partial(_of_kind, kind))


def _time_product(size: Size, make: Callable[[jax.Array], tuple[Callable, Any]]) -> dict[str, Any]:
    w = _weight(size)
    x = size.activations().reshape(size.tokens, size.width)
    product, held = make(w)
    compiled = jax.jit(product).lower(x, held).compile()
    seconds = seconds_per_call(lambda: compiled(x, held), size.repeats, 2 * size.steps)
    exact = jnp.dot(*(a.astype(jnp.float32) for a in (x[:256], w)), precision="highest")
    error = compiled(x, held)[:256].astype(jnp.float32) - exact
    return {
        "us": 1e6 * seconds,
        "TFLOP_per_second": 2 * x.shape[0] * w.size / seconds / 1e12,
        "relative_error": float(jnp.linalg.norm(error) / jnp.linalg.norm(exact)),
    }


def _of_kind(kind: str, w: jax.Array) -> tuple[Callable, Any]:
    return (lambda x, w: x @ w.dequantize()), quantize_array(w, kind, -2)


def _scaled(x: jax.Array, axis: int, largest: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Return `x` in a narrow dtype, and its scales along an axis."""
    scale = jnp.abs(x).max(axis, keepdims=True).astype(jnp.float32) / largest
    scaled = x.astype(jnp.float32) / scale
    narrow = jnp.round(scaled) if jnp.issubdtype(dtype, jnp.integer) else scaled
    return narrow.astype(dtype), scale


def _narrow(
    dtype: Any, largest: float, wide: Any, outputs_first: bool, w: jax.Array
) -> tuple[Callable, Any]:
    """Return a product of narrow operands with a scale per token and per output.

    With `outputs_first` the weight lies as `[out, in]`.
    """

    def product(x: jax.Array, held: Any) -> jax.Array:
        codes, scale = held
        rows, per_row = _scaled(x, 1, largest, dtype)
        numbers = (((1,), (int(outputs_first),)), ((), ()))
        y = lax.dot_general(rows, codes, numbers, preferred_element_type=wide)
        return (y.astype(jnp.float32) * per_row * scale).astype(x.dtype)

    codes, scale = _scaled(w, 0, largest, dtype)
    return product, (codes.T if outputs_first else codes, scale)


_PRODUCTS: dict[str, Callable[[jax.Array], tuple[Callable, Any]]] = {
    "bfloat16": lambda w: (jnp.matmul, w),
    "int8 × int8": partial(_narrow, jnp.int8, 127, jnp.int32, False),
    "int8 × int8, weight [out, in]": partial(_narrow, jnp.int8, 127, jnp.int32, True),
    "fp8 × fp8": partial(_narrow, jnp.float8_e4m3fn, 448, jnp.bfloat16, False),
    "fp8 × fp8, weight [out, in]": partial(_narrow, jnp.float8_e4m3fn, 448, jnp.bfloat16, True),
}
