"""Blocks of a decoder with `jax.nn.dot_product_attention`, and a step of each contender on them."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

import lora_jax
from benchmarks.accelerator.size import ADAPTED, Size
from lora_jax.core.quantized.weight import quantize_array

SCALE = 2.0  # alpha / rank
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Contender:
    """A training step of the blocks: `start()` makes (state, *data), `step` changes the state."""

    name: str
    step: Callable  # (state, *data) -> (state, loss)
    start: Callable[[], tuple]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all contenders of a table have in common; `scanned` blocks are rematerialized too."""

    size: Size
    rank: int = 16
    scanned: bool = False
    attention: str | None = None  # implementation of dot_product_attention, None for JAX's choice

    @property
    def stack(self) -> int | None:
        """The number of stacked layers, or None."""
        return self.size.scanned_layers if self.scanned else None

    def loss(self, layers: Any, x: jax.Array, product: Callable = jnp.matmul) -> jax.Array:
        """Return a loss of the last block's output, float32."""

        def block(x: jax.Array, p: Any) -> jax.Array:
            return self._block(x, p, product)

        if self.scanned:
            x = lax.scan(lambda x, p: (jax.checkpoint(block)(x, p), None), x, layers)[0]
        else:
            for p in layers:
                x = block(x, p)
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    def _block(self, x: jax.Array, p: Any, product: Callable) -> jax.Array:
        h = _rms_norm(x, p["attn_norm"])
        q, k, v = (product(h, p[name]).reshape(*x.shape[:2], self.size.heads, -1) for name in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=self.attention)
        x = x + product(mixed.reshape(x.shape), p["o"])
        h = _rms_norm(x, p["mlp_norm"])
        hidden = jax.nn.silu(product(h, p["gate"])) * product(h, p["up"])
        return x + product(hidden, p["down"])

    def each_block(self, fn: Callable, *layers: Any) -> Any:
        """Apply `fn` to the dict of each block, or to the single dict of stacked blocks."""
        if self.scanned:
            return fn(*layers)
        return [fn(*blocks) for blocks in zip(*layers, strict=True)]


def _rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scaled = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)
    return (scaled * weight).astype(x.dtype)


@partial(jax.jit, static_argnames="kind")
def quantize(p: dict[str, jax.Array], kind: str) -> dict[str, Any]:
    """Quantize the adapted weights of a block, or of stacked blocks, along their inputs."""
    return p | {name: quantize_array(p[name], kind, -2) for name in ADAPTED}


def floor(setting: Setting) -> Contender:
    """Return the frozen blocks' forward and backward pass down to their input, no more."""

    def step(x: jax.Array, layers: Any) -> tuple:
        loss, grad = jax.value_and_grad(lambda x: setting.loss(layers, x))(x)
        return x - LEARNING_RATE * grad, loss

    def start() -> tuple:
        return setting.size.activations(), setting.size.weights(setting.stack)

    return Contender("floor: frozen, input gradient", step, start)


def _trained(
    name: str,
    loss_of: Callable,
    start: Callable[[], tuple],
    tx: optax.GradientTransformation | None = None,
) -> Contender:
    """Return AdamW, or `tx`, on the first argument of `loss_of(trained, *data)`."""
    optimizer = tx or optax.adamw(LEARNING_RATE)

    def step(state: tuple, *data: Any) -> tuple:
        trained, moments = state
        loss, grads = jax.value_and_grad(loss_of)(trained, *data)
        updates, moments = optimizer.update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), loss

    def begin() -> tuple:
        trained, *data = start()
        return (trained, optimizer.init(trained)), *data

    return Contender(name, step, begin)


def _on_factors(setting: Setting, name: str, loss_of: Callable) -> Contender:
    size, stack = setting.size, setting.stack
    start = lambda: (size.factors(setting.rank, stack), size.weights(stack), size.activations())
    return _trained(name, loss_of, start)


def by_hand(setting: Setting, dtype: Any) -> Contender:
    """Return x @ W + (x @ A) @ (scale · B), the sum in bfloat16 or in float32."""

    def product(x: jax.Array, weight: Any) -> jax.Array:
        w, a, b = weight
        a, b = a.astype(x.dtype), (SCALE * b).astype(x.dtype)
        h = jnp.matmul(x, a, preferred_element_type=dtype).astype(x.dtype)
        update = jnp.matmul(h, b, preferred_element_type=dtype)
        return ((x @ w).astype(dtype) + update).astype(x.dtype)

    def loss_of(factors: Any, layers: Any, x: jax.Array) -> jax.Array:
        both = lambda p, ab: p | {n: (p[n], *ab[n]) for n in ADAPTED}
        return setting.loss(setting.each_block(both, layers, factors), x, product)

    return _on_factors(setting, f"by hand, sum in {jnp.dtype(dtype).name}", loss_of)


def merged(setting: Setting) -> Contender:
    """Return W + scale · A @ B first, then the plain blocks."""

    def loss_of(factors: Any, layers: Any, x: jax.Array) -> jax.Array:
        def one(p: Any, ab: Any) -> Any:
            dtype = p["q"].dtype
            return p | {n: (p[n] + SCALE * (a @ b)).astype(dtype) for n, (a, b) in ab.items()}

        return setting.loss(setting.each_block(one, layers, factors), x)

    return _on_factors(setting, "merge inside the loss", loss_of)


def full(setting: Setting) -> Contender:
    """Return full fine-tuning of every weight."""
    start = lambda: (setting.size.weights(setting.stack), setting.size.activations())
    return _trained("full fine-tuning", setting.loss, start)


def lora(
    setting: Setting,
    forms: lora_jax.Forms | None = None,
    name: str = "",
    kind: str | None = None,
) -> Contender:
    """Return lora_jax, with the forms that the backend gets or with others.

    With a `kind` the base is quantized.
    """
    config = lora_jax.LoraConfig(rank=setting.rank, alpha=SCALE * setting.rank, targets=ADAPTED)
    adapted = lora_jax.lora(setting.loss, forms=forms)

    def loss_of(adapters: Any, layers: Any, x: jax.Array) -> jax.Array:
        return adapted(lora_jax.join(layers, adapters), x)

    def start() -> tuple:
        layers, x = setting.size.weights(setting.stack), setting.size.activations()
        if kind:
            layers = setting.each_block(partial(quantize, kind=kind), layers)
        made = lora_jax.init(jax.random.key(0), layers, config, setting.loss, x)
        base, adapters = lora_jax.split(made)
        pairs = setting.size.factors(setting.rank, setting.stack)
        put = lambda p, ab: (
            p | {n: dataclasses.replace(p[n], a=ab[n][0], b=ab[n][1]) for n in ADAPTED}
        )
        return setting.each_block(put, adapters, pairs), base, x

    tx = lora_jax.freeze(optax.adamw(LEARNING_RATE), jax.eval_shape(lambda: start()[0]))
    return _trained(name or "lora_jax, default forms", loss_of, start, tx)
