"""The tables: which rows each has, and a function that measures a row."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp

import lora_jax
from benchmarks.accelerator import blocks, model, products, quantized, with_peft
from benchmarks.accelerator.blocks import Setting
from benchmarks.accelerator.size import SIZES, Size
from benchmarks.accelerator.timing import time_step

RANK = 16
#: A row: its name, and what measures it.
Row = tuple[str, Callable[[], dict[str, Any]]]
FIELDS = [field.name for field in dataclasses.fields(lora_jax.Forms) if field.type is bool]
PLAIN = lora_jax.Forms(**dict.fromkeys(FIELDS, False))


def _contender(size: Size, make: Callable[[], blocks.Contender]) -> dict[str, Any]:
    return time_step(make(), size)


def _rows_of_blocks(setting: Setting, makes: dict[str, Callable]) -> Iterator[Row]:
    for name, make in makes.items():
        yield name, partial(_contender, setting.size, partial(make, setting))


def rows_of_blocks(size: Size) -> Iterator[Row]:
    """Return every way to train the blocks, at rank 16."""
    yield from _rows_of_blocks(
        Setting(size, RANK),
        {
            "floor: frozen, input gradient": blocks.floor,
            "lora_jax, default forms": blocks.lora,
            "by hand, sum in bfloat16": lambda s: blocks.by_hand(s, jnp.bfloat16),
            "by hand, sum in float32": lambda s: blocks.by_hand(s, jnp.float32),
            "merge inside the loss": blocks.merged,
            "full fine-tuning": blocks.full,
            "floor again": blocks.floor,
        },
    )


def rows_of_forms(size: Size) -> Iterator[Row]:
    """Return lora_jax with all forms off, and with each switched from what the backend gets."""
    default = lora_jax.Forms.for_backend()
    chosen = {"all forms off": PLAIN}
    for name in FIELDS:
        on = getattr(default, name)
        label = f"default, `{name}` {'off' if on else 'on'}"
        chosen[label] = dataclasses.replace(default, **{name: not on})
    makes: dict[str, Callable] = {"floor: frozen, input gradient": blocks.floor}
    makes |= {name: partial(blocks.lora, forms=forms) for name, forms in chosen.items()}
    yield from _rows_of_blocks(Setting(size, RANK), makes)


def rows_of_ranks(size: Size) -> Iterator[Row]:
    """Return the ranks beside 16."""
    yield from _rows_of_blocks(Setting(size), {"floor: frozen, input gradient": blocks.floor})
    for rank in (8, 64):
        ways = {
            f"by hand, sum in bfloat16, r={rank}": lambda s: blocks.by_hand(s, jnp.bfloat16),
            f"lora_jax, default forms, r={rank}": blocks.lora,
        }
        yield from _rows_of_blocks(Setting(size, rank), ways)


def rows_of_scan(size: Size) -> Iterator[Row]:
    """Return stacked layers in a scan, each rematerialized."""
    scanned = dataclasses.replace(size, steps=max(1, size.steps // 2))
    yield from _rows_of_blocks(
        Setting(scanned, RANK, scanned=True),
        {
            "floor: frozen, input gradient": blocks.floor,
            "by hand, sum in bfloat16": lambda s: blocks.by_hand(s, jnp.bfloat16),
            "by hand, sum in float32": lambda s: blocks.by_hand(s, jnp.float32),
            "lora_jax, default forms": blocks.lora,
        },
    )


def rows_of_products(size: Size) -> Iterator[Row]:
    """Return single products."""
    yield from products.rows(size, RANK)


def rows_of_peft(size: Size) -> Iterator[Row]:
    """Return PEFT on the same blocks, where torch has CUDA."""
    for way in with_peft.WAYS:
        yield f"PEFT, {way}", partial(with_peft.time_way, size, RANK, way)


def rows_of_model(size: Size) -> Iterator[Row]:
    """Return `lora_jax.models` Llama in `make_step`, with the shapes of the blocks and of 8B."""
    small = size == SIZES["small"]
    config = model.config(size, "blocks", "none")
    run = partial(model.time_model, size, config, RANK, size.batch, size.time)
    yield "Llama, shapes of the blocks", run
    for remat in () if small else ("sums", "full"):
        config = model.config(size, "8B", remat)
        once = dataclasses.replace(size, repeats=3, steps=2)
        run = partial(model.time_model, once, config, RANK, 1, 4096)
        yield f"Llama-3-8B shapes, 1 × 4096 tokens, remat {remat}", run


def rows_of_quantized(size: Size) -> Iterator[Row]:
    """Return a training step with each kind of quantized base, timed in turn."""
    yield from quantized.steps(Setting(size, RANK), quantized.TRAINED, again=True)


def rows_of_more_tokens(size: Size) -> Iterator[Row]:
    """Return the same with twice the tokens."""
    twice = dataclasses.replace(size, time=2 * size.time)
    yield from quantized.steps(Setting(twice, RANK), quantized.TRAINED[:2])


def rows_of_quantized_scan(size: Size) -> Iterator[Row]:
    """Return the same with stacked layers in a scan, each rematerialized."""
    scanned = dataclasses.replace(size, steps=max(1, size.steps // 2))
    yield from quantized.steps(Setting(scanned, RANK, scanned=True), quantized.TRAINED[:1])


def rows_of_ties(size: Size) -> Iterator[Row]:
    """Return a training step with each way to make dequantization wait for its activation."""
    yield from quantized.ties(Setting(size, RANK), ("nf4",))


def rows_of_decoding(size: Size) -> Iterator[Row]:
    """Return the adapted blocks on one token, with each kind of base, timed in turn."""
    yield from quantized.decoding(Setting(size, RANK), quantized.MEASURED)


def rows_of_dequantization(size: Size) -> Iterator[Row]:
    """Return how fast a weight of each kind is dequantized."""
    yield from quantized.dequantization(size, quantized.MEASURED)


def rows_of_native_products(size: Size) -> Iterator[Row]:
    """Return products with a quantized weight, and products of narrow operands."""
    yield from quantized.native_products(size)


#: In the order in which they are measured: what matters most comes first.
TABLES: dict[str, Callable[[Size], Iterator[Row]]] = {
    "blocks": rows_of_blocks,
    "model": rows_of_model,
    "forms": rows_of_forms,
    "ranks": rows_of_ranks,
    "scan": rows_of_scan,
    "products": rows_of_products,
    "peft": rows_of_peft,
    "quantized": rows_of_quantized,
    "ties": rows_of_ties,
    "dequantization": rows_of_dequantization,
    "native_products": rows_of_native_products,
    "decoding": rows_of_decoding,
    "quantized_8k": rows_of_more_tokens,
    "quantized_scan": rows_of_quantized_scan,
}
