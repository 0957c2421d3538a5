"""A decoder of one layer with two adapters on it, and what continues a prompt alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax import models
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.pretrained import Pretrained
from lora_jax.models.text.byte_tokenizer import byte_tokenizer
from lora_jax.models.tiny import tiny
from lora_jax.serving.rows import Rows

KINDS = (
    {"rank": 2, "targets": ["query", "value"]},
    {"rank": 4, "targets": ["query", "up"], "scaling": "rslora"},
)
CONTEXT = 64  # of `rows`
PADDED = 40  # tokens of a prompt in `alone`, whatever its length


@functools.cache
def model() -> Pretrained:
    made = tiny(len(byte_tokenizer()))
    config = dataclasses.replace(made.config, num_hidden_layers=1)
    params = {k: v for k, v in made.params.items() if k != "layer_1"}
    return dataclasses.replace(made, config=config, module=Decoder(config), params=params)


@functools.cache
def stack():
    """Adapters whose effect is large enough to change most tokens."""
    rng, made = np.random.default_rng(0), []
    noisy = lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) if x.ndim > 1 else x
    ids = jnp.ones((1, 4), jnp.int32)
    for kind in KINDS:
        config = lora.LoraConfig(alpha=8, **kind)
        params = lora.init(jax.random.key(0), model().params, config, model().apply, ids)
        made.append(jax.tree.map(noisy, lora.split(params)[1]))
    return lora.stack([*made, lora.select(lora.stack(made), -1)])  # an empty slot behind them


@functools.cache
def rows() -> Rows:
    """Three rows, which tests share: what they compile is most of their time.

    Both the prompts and the cache outgrow their shortest length.
    """
    return Rows(model(), stack(), 3, CONTEXT, shortest=(32, 32))


def alone(ids, slot, steps, temperature=0.0, top_p=1.0, seed=0, top_k=0):
    """Return what `models.generate` continues one prompt with."""
    padded, segments = models.left_pad([ids, [0] * PADDED])
    return models.generate(
        model().apply,
        lora.join(model().params, stack()),
        padded[:1],
        model().module.init_cache(1, PADDED + CONTEXT),
        steps=steps,
        segments=segments[:1],
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        key=jax.random.key(seed),
        adapters_of=[slot],
    )[0].tolist()


@jax.jit
def _logits(params, ids, segments):
    return lora.lora(model().apply)(params, ids, segments)


def logits_after(ids, slot):
    """Return the logits after each of the tokens, `[len(ids), vocabulary]`, without a cache."""
    params = lora.join(model().params, lora.select(stack(), slot))
    padded, segments = (np.zeros((1, CONTEXT), np.int32) for _ in range(2))
    padded[0, : len(ids)], segments[0, : len(ids)] = ids, 1
    return np.asarray(_logits(params, padded, segments)[0, : len(ids)], np.float32)


def next_token(logits, ids, made, number, choosing):
    """Return the token that follows, computed token by token with numpy.

    Args:
      logits: `[vocabulary]` of the model.
      ids, made: the prompt, and the tokens after it so far.
      number: how many these are.
      choosing: as `Choosing`.
    """
    c, scores = choosing, logits.astype(np.float64)
    for token, value in c.bias:
        scores[token] += value
    for token in {*ids, *made}:
        scores[token] *= c.repetition if scores[token] <= 0 else 1 / c.repetition
    for token in set(made):
        scores[token] -= c.presence + c.frequency * made.count(token)
    if not c.temperature:
        return int(scores.argmax())
    scores /= c.temperature
    order = np.argsort(-scores, kind="stable")
    if c.top_k:
        scores[order[c.top_k :]] = -np.inf
    chances = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    if c.top_p < 1:
        scores[order[1:][chances[order].cumsum()[:-1] >= c.top_p]] = -np.inf
    scores[chances < c.min_p * chances.max()] = -np.inf
    key = jax.random.fold_in(jax.random.key(c.seed), number)
    return int(jax.random.categorical(key, jnp.asarray(scores, jnp.float32)))
