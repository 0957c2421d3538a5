"""Real digits: an MLP pre-trained on the odd ones is tuned on the even ones.

The images are scikit-learn's copy of the UCI set of handwritten digits, 1,797 of 8 × 8.
Pre-training on odd digits and tuning on even ones is the set-up of PiSSA's figure 2
(https://arxiv.org/abs/2404.02948), which uses MNIST instead.
"""

import functools
import importlib.metadata
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks.published.result import Unavailable

BATCH = 64
CLASSES = 10


class Data(NamedTuple):
    """Images `[n, 64]` with values from 0 to 1, and labels `[n]`."""

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def read() -> Data:
    """Read all digits from the file in the installed scikit-learn, without importing it."""
    try:
        package = importlib.metadata.distribution("scikit-learn")
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable("scikit-learn, which holds the digits, is not installed") from None
    path = str(package.locate_file("sklearn/datasets/data/digits.csv.gz"))
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    return Data(table[:, :-1] / 16, table[:, -1].astype(np.int32))


def odd() -> Data:
    """Return the digits that models are pre-trained on."""
    return select(read(), read().labels % 2 == 1)


def even() -> Data:
    """Return the digits that models are tuned on."""
    return select(read(), read().labels % 2 == 0)


def select(data: Data, chosen: Any) -> Data:
    """Select examples by a mask or by indices."""
    return Data(data.images[chosen], data.labels[chosen])


def held_out(data: Data, every: int = 4) -> tuple[Data, Data]:
    """Split into (train, test): every fourth example is for testing."""
    test = np.arange(len(data.labels)) % every == 0
    return select(data, ~test), select(data, test)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """Apply layers with ReLU between them, `[batch, 64]` to logits `[batch, 10]`."""
    *hidden, last = sorted(params)
    for name in hidden:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params[last]["kernel"] + params[last]["bias"][None]


def inputs(params: Any, x: Any) -> dict[str, jax.Array]:
    """Return the input `[batch, fan_in]` of each layer of `mlp`, by name."""
    names = sorted(params)
    found = {names[0]: x}
    for i, name in enumerate(names[1:], 1):
        found[name] = jax.nn.relu(mlp({n: params[n] for n in names[:i]}, x))
    return found


def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, images), labels).mean()


def fresh(widths: Sequence[int], seed: int) -> dict[str, Any]:
    """Initialize an MLP from 64 inputs through layers of these widths to 10 classes."""
    rng = np.random.default_rng(seed)
    sizes = [64, *widths, CLASSES]
    return {
        f"layer_{i}": {
            "kernel": (rng.standard_normal((m, n)) * (2 / m) ** 0.5).astype(np.float32),
            "bias": np.zeros(n, np.float32),
        }
        for i, (m, n) in enumerate(itertools.pairwise(sizes))
    }


def train(
    params: Any,
    tx: optax.GradientTransformation,
    data: Data,
    watched: Data,
    key: jax.Array,
    steps: int,
    every: int,
) -> tuple[Any, jax.Array]:
    """Train on random batches; return parameters, and losses on `watched` at the start and `every`.

    Parameters may be plain or adapted; `tx` decides which of them train.
    """
    fn = lora_jax.lora(loss, on_dense="error")
    images, labels = map(jnp.asarray, data)

    def step(state: tuple, key: jax.Array) -> tuple:
        params, moments = state
        chosen = jax.random.randint(key, (BATCH,), 0, len(labels))
        grads = jax.grad(fn)(params, images[chosen], labels[chosen])
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), None

    def chunk(state: tuple, keys: jax.Array) -> tuple:
        state, _ = jax.lax.scan(step, state, keys)
        return state, fn(state[0], *watched)

    keys = jax.random.split(key, (steps // every, every))
    before = fn(params, *watched)
    after: jax.Array
    (params, _), after = jax.lax.scan(chunk, (params, tx.init(params)), keys)
    return params, jnp.concatenate([before[None], after])


@functools.partial(jax.jit, static_argnames=("epochs",))
def _pretrain(params: Any, data: Data, key: jax.Array, epochs: int) -> Any:
    steps = epochs * (len(data.labels) // BATCH)
    return train(params, optax.adam(5e-4), data, data, key, steps, steps)[0]


@functools.cache
def pretrained(widths: tuple[int, ...], seed: int, epochs: int = 20) -> Any:
    """Return an MLP after Adam at 5e-4 on the odd digits."""
    return _pretrain(fresh(widths, seed), odd(), jax.random.key(seed), epochs)


Optimizer = Callable[[jax.Array, Any], optax.GradientTransformation]


def adam(learning_rate: jax.Array, params: Any) -> optax.GradientTransformation:
    """Return Adam on everything, or on the adapters if there are any."""
    tx = optax.adam(learning_rate)
    return lora_jax.freeze(tx, params) if is_adapted(params) else tx


def is_adapted(params: Any) -> bool:
    """Return whether a tree contains adapters."""
    return lora_jax.count_params(params).trainable > 0


@functools.partial(jax.jit, static_argnames=("config", "steps", "every", "optimizer"))
def tune(
    base: Any,
    data: Data,
    watched: Data,
    key: jax.Array,
    learning_rate: jax.Array,
    config: lora_jax.LoraConfig | None,
    steps: int,
    every: int,
    optimizer: Optimizer = adam,
) -> jax.Array:
    """Tune `base` with LoRA by `config`, or fully with None; return the losses on `watched`."""
    init_key, train_key = jax.random.split(key)
    params = base
    if config is not None:
        params = lora_jax.init(init_key, base, config, mlp, data.images)
    tx = optimizer(learning_rate, params)
    return train(params, tx, data, watched, train_key, steps, every)[1]
