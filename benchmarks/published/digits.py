"""Real digits: an MLP that learned the odd ones is tuned on the even ones.

The images are scikit-learn's copy of the UCI set of handwritten digits, 1,797 of 8 × 8.
Pre-training on odd digits and tuning on even ones is the set-up of PiSSA's figure 2
(https://arxiv.org/abs/2404.02948), which has MNIST in their place.
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
    """Images `[n, 64]` of values from 0 to 1, labels `[n]`."""

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def read() -> Data:
    """All digits, from the file in the installed scikit-learn; it need not be imported."""
    try:
        package = importlib.metadata.distribution("scikit-learn")
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable("scikit-learn, which holds the digits, is not installed") from None
    path = str(package.locate_file("sklearn/datasets/data/digits.csv.gz"))
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    return Data(table[:, :-1] / 16, table[:, -1].astype(np.int32))


def odd() -> Data:
    """What models are pre-trained on."""
    return select(read(), read().labels % 2 == 1)


def even() -> Data:
    """What models are tuned on."""
    return select(read(), read().labels % 2 == 0)


def select(data: Data, chosen: Any) -> Data:
    """The chosen examples: a mask or numbers."""
    return Data(data.images[chosen], data.labels[chosen])


def held_out(data: Data, every: int = 4) -> tuple[Data, Data]:
    """(train, test): each fourth example is for testing."""
    test = np.arange(len(data.labels)) % every == 0
    return select(data, ~test), select(data, test)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """Layers with ReLU between, `[batch, 64]` to logits `[batch, 10]`."""
    *hidden, last = sorted(params)
    for name in hidden:
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
    return x @ params[last]["kernel"] + params[last]["bias"][None]


def inputs(params: Any, x: Any) -> dict[str, jax.Array]:
    """What each layer of `mlp` gets, by its name, `[batch, fan_in]`."""
    names = sorted(params)
    found = {names[0]: x}
    for i, name in enumerate(names[1:], 1):
        found[name] = jax.nn.relu(mlp({n: params[n] for n in names[:i]}, x))
    return found


def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(mlp(params, images), labels).mean()


def fresh(widths: Sequence[int], seed: int) -> dict[str, Any]:
    """An MLP from 64 inputs through layers of these widths to 10 classes, not trained."""
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
    """Steps on random batches: the parameters, and the loss on `watched` before and each `every`.

    Plain parameters and adapted ones alike; `tx` says what of them trains.
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
    """An MLP after Adam at 5e-4 on the odd digits."""
    return _pretrain(fresh(widths, seed), odd(), jax.random.key(seed), epochs)


Optimizer = Callable[[jax.Array, Any], optax.GradientTransformation]


def adam(learning_rate: jax.Array, params: Any) -> optax.GradientTransformation:
    """Adam on everything, or on the adapters where there are any."""
    tx = optax.adam(learning_rate)
    return lora_jax.freeze(tx, params) if is_adapted(params) else tx


def is_adapted(params: Any) -> bool:
    """Whether a tree holds adapters."""
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
    """The losses on `watched` of a run from `base`: LoRA by `config`, or None for everything."""
    init_key, train_key = jax.random.split(key)
    params = base
    if config is not None:
        params = lora_jax.init(init_key, base, config, mlp, data.images)
    tx = optimizer(learning_rate, params)
    return train(params, tx, data, watched, train_key, steps, every)[1]
