"""The contenders: one training step each, for the same model and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import lora_jax
from benchmarks import decoder
from benchmarks.decoder import ADAPTED, Size
from lora_jax.core.quantized.weight import quantize_array

SCALE = 2.0  # alpha / rank
LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Contender:
    """A training step and its initial state.

    `make()` returns a new function each time, so that JAX has nothing of it in its caches.
    """

    key: str
    label: str
    # () -> step; step(state, *data) -> (state, loss)
    make: Callable[[], Callable]
    # () -> (state, *data); the state is donated
    start: Callable[[], tuple]
    # fn(state, *data) -> (loss, gradients of A and B) if there are adapters; for the tests
    grads: Callable | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
    """Model, factors and batch, the same for every contender; with a `kind` a quantized base."""

    size: Size
    variant: str
    kind: str | None = None

    def params(self) -> Any:
        """Return the base weights."""
        params = decoder.init(self.size, self.variant)
        if self.kind is None:
            return params
        coded = lambda p: p | {n: quantize_array(p[n], self.kind, -2) for n in ADAPTED}
        return params | {"layers": each_block(coded, params["layers"])}

    def adapters(self) -> Any:
        """Return (A, B) of every adapted weight, in a tree like `params()["layers"]`."""
        return decoder.adapters(self.size, self.variant)

    def batch(self) -> jax.Array:
        """Return the tokens."""
        return decoder.tokens(self.size)

    def loss(self, params: Any, batch: jax.Array, **options: Any) -> jax.Array:
        """Compute the loss of the plain model."""
        return decoder.loss(params, batch, self.size.heads, self.variant, **options)


def each_block(fn: Callable, *layers: Any) -> Any:
    """Apply `fn` to the dict of each block, or to the single dict of stacked blocks."""
    if isinstance(layers[0], list):
        return [fn(*blocks) for blocks in zip(*layers, strict=True)]
    return fn(*layers)


def adamw_step(loss_of: Callable) -> Callable:
    """Return a step of AdamW on `trained`, for loss_of(trained, base, batch)."""
    tx = optax.adamw(LEARNING_RATE)

    def step(state: tuple, base: Any, batch: jax.Array) -> tuple:
        trained, moments = state
        loss, grads = jax.value_and_grad(loss_of)(trained, base, batch)
        updates, moments = tx.update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), loss

    return step


def adamw_start(trained: Any) -> tuple:
    """Return the initial state of `adamw_step`."""
    return trained, optax.adamw(LEARNING_RATE).init(trained)


def floor(setting: Setting) -> Contender:
    """Return the frozen model's forward and backward pass down to the embedded tokens, no more."""

    def make() -> Callable:
        def loss_of(x: jax.Array, params: Any, batch: jax.Array) -> jax.Array:
            x = decoder.blocks(x, params["layers"], setting.size.heads, setting.variant)
            return decoder.cross_entropy(params, x, batch[:, 1:])

        def step(x: jax.Array, params: Any, batch: jax.Array) -> tuple:
            loss, grad = jax.value_and_grad(loss_of)(x, params, batch)
            return x - LEARNING_RATE * grad, loss

        return step

    def start() -> tuple:
        params, batch = setting.params(), setting.batch()
        return decoder.embed(params, batch[:, :-1]), params, batch

    return Contender("a", "floor: frozen model, input gradient", make, start)


def _on_adapters(setting: Setting, key: str, label: str, loss_of: Callable) -> Contender:
    """Return a contender that trains (A, B) pairs next to an unchanged base."""

    def make() -> Callable:
        return adamw_step(lambda *args: loss_of(*args))

    def start() -> tuple:
        return adamw_start(setting.adapters()), setting.params(), setting.batch()

    def grads(state: tuple, base: Any, batch: jax.Array) -> tuple:
        return jax.value_and_grad(loss_of)(state[0], base, batch)

    return Contender(key, label, make, start, grads)


def _with_pairs(params: Any, adapters: Any) -> Any:
    """Return the parameters with (W, A, B) for each adapted weight."""
    merged = each_block(
        lambda p, ab: p | {n: (p[n], *ab[n]) for n in ab}, params["layers"], adapters
    )
    return params | {"layers": merged}


def loss_by_hand(setting: Setting, **options: Any) -> Callable:
    """Return loss(adapters, params, batch), with y = x @ W + (x @ A) @ (scale * B) written out."""

    def product(x: jax.Array, weight: tuple) -> jax.Array:
        w, a, b = weight
        return x @ w + (x @ a) @ (SCALE * b)

    def loss_of(adapters: Any, params: Any, batch: jax.Array) -> jax.Array:
        return setting.loss(_with_pairs(params, adapters), batch, product=product, **options)

    return loss_of


def by_hand(setting: Setting) -> Contender:
    """Return y = x @ W + (x @ A) @ (scale * B), on `[batch, time, width]`."""
    return _on_adapters(setting, "b", "by hand, x@W + (x@A)@(scale*B)", loss_by_hand(setting))


def by_hand_flat(setting: Setting) -> Contender:
    """Return the same on activations with two axes: x is reshaped before each adapted product."""

    def product(x: jax.Array, weight: tuple) -> jax.Array:
        w, a, b = weight
        flat = x.reshape(-1, x.shape[-1])
        return (flat @ w + (flat @ a) @ (SCALE * b)).reshape(*x.shape[:-1], -1)

    def loss_of(adapters: Any, params: Any, batch: jax.Array) -> jax.Array:
        return setting.loss(_with_pairs(params, adapters), batch, product=product)

    return _on_adapters(setting, "c", "by hand, activations flattened", loss_of)


def merge_in_loss(setting: Setting) -> Contender:
    """Return W + scale * A @ B first, then the plain model."""

    def loss_of(adapters: Any, params: Any, batch: jax.Array) -> jax.Array:
        merged = each_block(
            lambda p, ab: p | {n: p[n] + SCALE * (a @ b) for n, (a, b) in ab.items()},
            params["layers"],
            adapters,
        )
        return setting.loss(params | {"layers": merged}, batch)

    return _on_adapters(setting, "d", "merge inside the loss", loss_of)


def full(setting: Setting) -> Contender:
    """Return full fine-tuning: every leaf is trained."""

    def make() -> Callable:
        return adamw_step(lambda params, base, batch: setting.loss(params, batch))

    return Contender(
        "e",
        "full fine-tuning",
        make,
        lambda: (adamw_start(setting.params()), (), setting.batch()),
    )


def adapted(setting: Setting) -> Any:
    """Return the parameters with a `LoraWeight` for each adapted weight, with the same A and B."""
    config = lora_jax.LoraConfig(
        rank=setting.size.rank, alpha=SCALE * setting.size.rank, targets=list(ADAPTED)
    )
    params = lora_jax.init(
        jax.random.key(0), setting.params(), config, setting.loss, setting.batch()
    )
    layers = each_block(
        lambda p, ab: p | {n: dataclasses.replace(p[n], a=a, b=b) for n, (a, b) in ab.items()},
        params["layers"],
        setting.adapters(),
    )
    return params | {"layers": layers}


def pairs_of(params: Any) -> Any:
    """Return (A, B) of every adapted weight in a joined tree or in adapters alone."""
    return each_block(lambda p: {n: (p[n].a, p[n].b) for n in ADAPTED}, params["layers"])


def joined(setting: Setting) -> Contender:
    """Return lora_jax on one tree, differentiated and donated as a whole; `freeze` masks."""

    def make() -> Callable:
        loss_of = lora_jax.lora(lambda *args: setting.loss(*args))
        tx = lora_jax.freeze(optax.adamw(LEARNING_RATE), jax.eval_shape(lambda: adapted(setting)))

        def step(state: tuple, batch: jax.Array) -> tuple:
            params, moments = state
            loss, grads = jax.value_and_grad(loss_of)(params, batch)
            updates, moments = tx.update(grads, moments, params)
            return (optax.apply_updates(params, updates), moments), loss

        return step

    def start() -> tuple:
        params = adapted(setting)
        tx = lora_jax.freeze(optax.adamw(LEARNING_RATE), params)
        return (params, tx.init(params)), setting.batch()

    def grads(state: tuple, batch: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(lora_jax.lora(setting.loss))(state[0], batch)
        return loss, pairs_of(grads)

    return Contender("h", "lora_jax, joined", make, start, grads)


def loss_split(setting: Setting, **options: Any) -> Callable:
    """Return lora_jax's loss(adapters, base, batch)."""

    def loss_of(adapters: Any, base: Any, batch: jax.Array) -> jax.Array:
        plain = lambda params, batch: setting.loss(params, batch, **options)
        return lora_jax.lora(plain)(lora_jax.join(base, adapters), batch)

    return loss_of


def split(setting: Setting) -> Contender:
    """Return lora_jax on base and adapters apart; only adapters are differentiated and donated."""
    loss_of = loss_split(setting)

    def make() -> Callable:
        _, adapters = lora_jax.split(jax.eval_shape(lambda: adapted(setting)))
        tx = lora_jax.freeze(optax.adamw(LEARNING_RATE), adapters)

        def step(state: tuple, base: Any, batch: jax.Array) -> tuple:
            adapters, moments = state
            loss, grads = jax.value_and_grad(loss_of)(adapters, base, batch)
            updates, moments = tx.update(grads, moments, adapters)
            return (optax.apply_updates(adapters, updates), moments), loss

        return step

    def start() -> tuple:
        base, adapters = lora_jax.split(adapted(setting))
        tx = lora_jax.freeze(optax.adamw(LEARNING_RATE), adapters)
        return (adapters, tx.init(adapters)), base, setting.batch()

    def grads(state: tuple, base: Any, batch: jax.Array) -> tuple:
        loss, grads = jax.value_and_grad(loss_of)(state[0], base, batch)
        return loss, pairs_of(grads)

    return Contender("i", "lora_jax, split", make, start, grads)


#: In the order of the table; those of other libraries are added if they are installed.
OF_JAX: tuple[Callable[[Setting], Contender], ...] = (
    floor,
    by_hand,
    by_hand_flat,
    merge_in_loss,
    full,
    joined,
    split,
)
