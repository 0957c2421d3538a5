"""What rows draw from, beside transformers' logits processors (recorded, 5.24)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.serving import marks as marking
from lora_jax.serving.choosing import Choosing, bias_of, controls
from lora_jax.serving.row_sampling import choose, left
from tests.parity import transformers

RECORDED = pathlib.Path(transformers.__file__).parent / "sampling.npz"


def test_what_is_drawn_from():
    """All cases are rows of one batch; each draws as it would alone from transformers' scores."""
    with np.load(RECORDED) as file:
        logits, prompts, made, bias, cases, wanted = (
            file[x] for x in ("logits", "prompts", "made", "bias", "cases", "scores")
        )
    vocabulary = logits.shape[1]
    rows = [
        Choosing(
            *(temperature, top_p, seed, 0, int(top_k), min_p, presence, frequency, repetition),
            bias=tuple((i, x) for i, x in enumerate(bias[seed].tolist()) if x),
        )
        for seed, (temperature, top_k, top_p, min_p, repetition, presence, frequency) in enumerate(
            cases.tolist()
        )
    ]
    given = [np.concatenate(x) for x in zip(*[bias_of(x, vocabulary) for x in rows], strict=True)]
    # A pad before the prompt, whose id must not count.
    ids, segments = np.pad(prompts, ((0, 0), (2, 0))), np.pad(prompts * 0 + 1, ((0, 0), (2, 0)))
    keys = jax.vmap(jax.random.key)(np.arange(len(rows)))
    steps = np.arange(len(rows), dtype=np.int32)

    @jax.jit
    def run(numbers):
        marks = marking.mark_prompts(ids, segments, given, vocabulary)
        for column in made.T:
            marks = marking.mark_made(marks, jnp.asarray(column))
        changed = marking.penalized(
            jnp.asarray(logits), marks, numbers.presence, numbers.frequency, numbers.repetition
        )
        return left(changed, numbers), choose(logits, keys, steps, marks, numbers)

    numbers = controls(rows, vocabulary)
    found, tokens = map(np.asarray, run(numbers))
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(wanted))
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    assert len(set(np.isfinite(wanted).sum(1))) > 5  # the cases leave different numbers of tokens

    def drawn(scores, key, step):
        return int(jax.random.categorical(jax.random.fold_in(key, step), scores))

    assert tokens.tolist() == [*map(drawn, wanted, keys, steps)]
    greedy = run(numbers._replace(temperature=numbers.temperature * 0))[1]
    assert greedy.tolist() == wanted.argmax(1).tolist()  # nothing that is left out is the largest
    assert not np.array_equal(greedy, logits.argmax(1))
