"""Memory and FLOPs of a training step with LoRA and with full fine-tuning, as XLA counts them.

The steps are compiled for shapes, so the model can be GPT-3 175B itself; nothing is allocated. The
paper (https://arxiv.org/abs/2106.09685, section 4.2) went from 1.2 TB to 350 GB, "up to 2/3" less.
"LoRA Without Regret" derives the FLOPs: (2N² + 6Nr) / 3N² for a weight of N × N, hence
(2KN + 3r(K + N)) / 3KN for one of K × N.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

import lora_jax
from benchmarks import decoder
from benchmarks.decoder import Size
from benchmarks.published.counts import GPT3, QV, SOURCE, decoder_shapes
from benchmarks.published.result import Result, Row

BLOG = "https://thinkingmachines.ai/blog/lora/"
LAYERS = 8  # layers of the model whose FLOPs are counted: XLA counts a loop's body once, so no loop


def full_step(loss: Callable) -> Callable:
    """Return step((params, moments), tokens), with Adam on everything."""

    def step(state: tuple, tokens: Any) -> tuple:
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, moments = optax.adam(1e-4).update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step


def lora_step(loss: Callable, tx: optax.GradientTransformation) -> Callable:
    """Return step((adapters, moments), base, tokens), with `tx` on the adapters."""
    adapted = lora_jax.lora(loss, on_dense="error")

    def step(state: tuple, base: Any, tokens: Any) -> tuple:
        adapters, moments = state
        value, grads = jax.value_and_grad(
            lambda adapters: adapted(lora_jax.join(base, adapters), tokens)
        )(adapters)
        updates, moments = tx.update(grads, moments, adapters)
        return (optax.apply_updates(adapters, updates), moments), value

    return step


def compiled_pair(size: Size, variant: str, rank: int, targets: Sequence[str]) -> tuple[Any, Any]:
    """Compile the steps of (full fine-tuning, LoRA) for shapes; the state is donated."""
    params, tokens = decoder_shapes(size)
    if variant == "unrolled":
        params |= {"layers": [one_layer(params["layers"]) for _ in range(size.layers)]}
    loss = lambda params, tokens: decoder.loss(params, tokens, size.heads, variant)
    config = lora_jax.LoraConfig(rank=rank, targets=targets)
    base, adapters = lora_jax.split(lora_jax.init(jax.random.key(0), params, config, loss, tokens))
    tx = lora_jax.freeze(optax.adam(1e-4), adapters)
    moments = jax.eval_shape(optax.adam(1e-4).init, params)
    full = jax.jit(full_step(loss), donate_argnums=0).lower((params, moments), tokens)
    state = adapters, jax.eval_shape(tx.init, adapters)
    lora = jax.jit(lora_step(loss, tx), donate_argnums=0).lower(state, base, tokens)
    return full.compile(), lora.compile()


def one_layer(layers: Any) -> Any:
    """Return the shapes of one of several stacked layers."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), layers)


def memory(compiled: Any) -> int:
    """Return bytes of arguments, outputs and temporaries; a donated argument is its output."""
    m = compiled.memory_analysis()
    return (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
        + m.temp_size_in_bytes
    )


def flops(compiled: Any) -> float:
    """Return the FLOPs of one run; a loop's body counts once."""
    return compiled.cost_analysis()["flops"]


def memory_row(size: Size = GPT3, rank: int = 4) -> Row:
    """Measure weights, moments, gradients and temporaries of a rematerialized float32 step."""
    full, lora = map(memory, compiled_pair(size, "scan_remat", rank, QV))
    return Row(
        "memory of a training step with Adam",
        SOURCE,
        f"{size.layers} layers of width {size.width} (GPT-3 175B), r={rank} on q,v, {size.time} "
        "tokens, float32, compiled",
        "3 times less: 1.2 TB to 350 GB (16 bit)",
        f"{full / lora:.2f} times less: {full / 1e12:.2f} TB to {lora / 1e9:.0f} GB",
        full / lora >= 3,
    )


def derived_share(size: Size, rank: int, targets: Sequence[str]) -> float:
    """Return the blog's formula, summed over the kernels of the blocks and the output layer."""
    kernels = size.kernels()
    weights = size.layers * sum(k * n for k, n in kernels.values()) + size.width * size.vocabulary
    factors = size.layers * sum(rank * sum(kernels[name]) for name in targets)
    return (2 * weights + 3 * factors) / (3 * weights)


def flops_row(rank: int, targets: Sequence[str], size: Size) -> Row:
    """Measure the FLOPs of one step, next to the derived share."""
    full, lora = map(flops, compiled_pair(size, "unrolled", rank, targets))
    expected = derived_share(size, rank, targets)
    return Row(
        "FLOPs of a training step, LoRA over full",
        BLOG,
        f"{size.layers} layers of width {size.width}, r={rank} on {','.join(targets)}, "
        f"{size.time} tokens, compiled",
        f"slightly more than 2/3; its formula: {expected:.3f}",
        f"{lora / full:.3f}",
        abs(lora / full / expected - 1) < 0.01,
    )


def run() -> Result:
    """Measure memory at full size, and FLOPs without a loop, hence with fewer layers."""
    size = dataclasses.replace(GPT3, layers=LAYERS)
    return Result(
        [
            memory_row(),
            flops_row(4, QV, size),
            flops_row(256, decoder.ADAPTED, size),
        ]
    )
