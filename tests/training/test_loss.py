"""Losses against numbers computed by hand, and what packing must not change."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.training import batching, loss
from lora_jax.training.tokenize import Example
from tests.training import tiny_model

# Jitted: op by op, each operation would be compiled separately.
LANGUAGE = jax.jit(loss.language_sums(tiny_model.apply))


def by_hand(logits, ids, segments, weights):
    """Compute Σ -log p(next token) in float64, token by token."""
    total = 0.0
    for row in range(ids.shape[0]):
        for place in range(1, ids.shape[1]):
            if weights[row, place]:
                assert segments[row, place] == segments[row, place - 1] > 0
                x = np.asarray(logits[row, place - 1], np.float64)
                total += np.log(np.exp(x - x.max()).sum()) + x.max() - x[ids[row, place]]
    return total


def example(seed, length, prompt=1):
    ids = np.random.default_rng(seed).integers(1, tiny_model.VOCABULARY, length).astype(np.int32)
    return Example(ids, np.arange(length) >= prompt)


EXAMPLES = [example(0, 5, 2), example(1, 3), example(2, 6, 5), example(3, 4), example(4, 2)]


def test_masks_by_hand():
    batch = batching.pack_examples(EXAMPLES, 8).arrays
    params = tiny_model.params()
    logits = jax.jit(tiny_model.apply)(params, batch["ids"], batch["segments"])
    sums = LANGUAGE(params, batch)
    expected = by_hand(logits, batch["ids"], batch["segments"], batch["weights"])
    assert sums["weight"] == 3 + 2 + 1 + 3 + 1
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-6)


def test_the_last_token_is_predicted_and_not_read():
    """So rows of n tokens to predict cost n tokens of work."""
    read = []

    def noted(params, ids, segments):
        read.append((ids, segments))
        return tiny_model.apply(params, ids, segments)

    batch = batching.cut_stream(tiny_model.stream(9), length=4).arrays
    sums = loss.language_sums(noted)(tiny_model.params(), batch)
    np.testing.assert_array_equal(read[0][0], batch["ids"][:, :4])
    assert read[0][1].shape == (2, 4) and sums["weight"] == 8


def test_packed_texts_have_the_loss_they_have_alone(x64):
    params = tiny_model.params(dtype=jnp.float64)
    packed = LANGUAGE(params, batching.pack_examples(EXAMPLES, 8).arrays)
    alone = [LANGUAGE(params, batching.pack_examples([e], 8).arrays) for e in EXAMPLES]
    for name in ("loss", "weight"):
        np.testing.assert_allclose(packed[name], sum(s[name] for s in alone), rtol=1e-12)


def test_padding_counts_for_nothing():
    """Not even if the model's output there is not finite."""

    def broken(params, ids, segments):
        return jnp.where(segments[..., None] > 0, tiny_model.apply(params, ids, segments), jnp.nan)

    batch = batching.pack_examples(EXAMPLES, 10).arrays
    assert (batch["segments"] == 0).any()
    found = jax.jit(loss.language_sums(broken))(tiny_model.params(), batch)
    np.testing.assert_allclose(
        found["loss"], LANGUAGE(tiny_model.params(), batch)["loss"], rtol=1e-6
    )


def test_half_precision_is_summed_in_single():
    logits = jnp.asarray([[8.0, 0.0, -8.0]], jnp.bfloat16)
    found = loss.cross_entropy(logits, jnp.array([1]))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [8 + np.log(1 + np.exp(-8) + np.exp(-16))], rtol=1e-6)


def test_classes():
    logits = np.array([[[0.0, np.log(3)], [9.0, -9.0]], [[0.0, np.log(3)], [1.0, 0.0]]], np.float32)
    batch = {
        "ids": np.zeros((2, 1), np.int32),
        "segments": np.zeros((2, 1), np.int32),
        "labels": np.array([[1, 0], [0, 0]], np.int32),
        "weights": np.array([[1, 0], [1, 0]], np.float32),
    }
    sums = loss.class_sums(lambda params, ids, segments: jnp.asarray(logits))({}, batch)
    np.testing.assert_allclose(sums["loss"], np.log(4 / 3) + np.log(4), rtol=1e-6)
    assert (sums["weight"], sums["right"]) == (2, 1)
