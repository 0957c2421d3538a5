"""A sweep whose gradients are computed otherwise: micro-batches, and more that is measured."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from tests.adapters.sweeps.by_hand import BASE, CONFIG, LOSS, batches


def in_halves(adapters, base, *batch_and_key):
    """Differentiate the first and the second half of the rows, one after the other."""
    *batch, key = batch_and_key
    loss = lambda adapters, *part: LOSS(lora.with_dropout(lora.join(base, adapters), key), *part)
    half = len(batch[0]) // 2
    parts = [[x[:half] for x in batch], [x[half:] for x in batch]]
    found = [jax.value_and_grad(loss)(adapters, *part) for part in parts]
    losses = jnp.stack([value for value, _ in found])
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *(gradients for _, gradients in found))
    return mean, {"mean": losses.mean(), "parts": losses}


def test_micro_batches_train_as_the_whole_batch_does():
    """Two halves of equal size, whose means have the mean of all; what is measured is a tree."""
    runs = lora.grid(learning_rate=[1e-2, 3e-2], rank=[1, 2])
    data = batches()
    whole = lora.sweep(LOSS, BASE, runs, CONFIG, *data[0])
    parts = lora.sweep(LOSS, BASE, runs, CONFIG, *data[0], gradients=in_halves)
    one, other = whole.init(), parts.init()
    for batch in data:
        one, losses = whole.step(one, *batch)
        other, measured = parts.step(other, *batch)
        assert measured["parts"].shape == (4, 2)
        np.testing.assert_allclose(measured["mean"], losses, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-7)
