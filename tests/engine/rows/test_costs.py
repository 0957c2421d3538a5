"""What a batch with many adapters costs: the base once, A and B per row, and nothing per token."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax as lora
from lora_jax.models.decoder.module import Decoder, DecoderConfig
from tests.programs.jaxprs import equations

# No two sizes are equal, so a shape says what an array is.
ROWS, TIME, WIDTH, HIDDEN, RANK, SLOTS, LAYERS = 6, 7, 11, 13, 3, 5, 2
X = jnp.ones((ROWS, TIME, WIDTH))


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


BASE = {"up": draw(0, LAYERS, WIDTH, HIDDEN), "down": draw(1, LAYERS, HIDDEN, WIDTH)}


def layer(x, ws):
    return x + jnp.tanh(x @ ws["up"]) @ ws["down"], None


def scanned(params, x):
    return lax.scan(jax.checkpoint(layer), x, params)[0]


def one_by_one(params, x):
    for i in range(LAYERS):
        x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], params))
    return x


def mapped(params, x):
    """Meet what has no rows as well, so that the rows are computed by `jax.vmap`."""
    queries, _ = layer(jnp.ones((1, 1, WIDTH)), jax.tree.map(lambda w: w[0], params))
    return scanned(params, x) + queries


def stack_of(base, fn):
    config = lora.LoraConfig(rank=RANK, alpha=3)
    params = lora.init(jax.random.key(0), base, config, fn, X)
    return lora.stack([lora.split(params)[1]] * SLOTS)


def shapes(fn, *args):
    """Return the shapes of all arrays that a program and its derivative make."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return [Counter(v.aval.shape) for eqn in equations(jaxpr) for v in eqn.outvars]


def loss(fn):
    return lambda *args: (fn(*args) ** 2).sum()


@pytest.mark.parametrize("fn", [scanned, one_by_one, mapped], ids=lambda fn: fn.__name__)
def test_nothing_is_made_per_row_of_the_bases_size_nor_per_token_of_the_factors(fn):
    stack = stack_of(BASE, fn)
    run = lambda stack, x, ids: lora.lora(fn, adapters_of=ids)(lora.join(BASE, stack), x)
    found = shapes(jax.grad(loss(run), (0, 1)), stack, X, jnp.zeros(ROWS, jnp.int32))
    for made in found:
        assert not Counter((ROWS, WIDTH, HIDDEN)) <= made
        assert not Counter((SLOTS, WIDTH, HIDDEN)) <= made
        for width in (WIDTH, HIDDEN):
            assert not Counter((ROWS, TIME, width, RANK)) <= made
    assert any(Counter((ROWS, WIDTH, RANK)) <= made for made in found)  # A per row


def test_the_scale_multiplies_what_is_small():
    """Each row's x·A, not each row's B: a decoding step would write the Bs of all rows."""
    stack = lora.select(stack_of(BASE, one_by_one), np.arange(ROWS) % SLOTS)
    run = lora.lora(one_by_one, adapters_of=np.arange(ROWS))
    jaxpr = jax.make_jaxpr(run)(lora.join(BASE, stack), X).jaxpr
    products = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "mul"]
    made = [Counter(eqn.outvars[0].aval.shape) for eqn in products]
    assert any(Counter((ROWS, TIME, RANK)) <= x for x in made)
    for width in (WIDTH, HIDDEN):
        assert not any(Counter((RANK, width)) <= x for x in made)


@pytest.mark.parametrize("kind", [None, pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fn", [scanned, one_by_one], ids=lambda fn: fn.__name__)
def test_a_vmap_over_a_stack_keeps_the_base_unmapped(fn, kind):
    """All adapters share one large product, forward and backward."""
    stack = stack_of(BASE, fn)
    base = BASE if kind is None else lora.quantize(BASE, kind, fn, X)
    run = lambda stack, x: lora.lora(fn)(lora.join(base, stack), x)
    every = jax.vmap(jax.grad(loss(run), (0, 1)), (0, None))
    for made in shapes(every, stack, X):
        assert not Counter((SLOTS, WIDTH, HIDDEN)) <= made


def test_64_adapters_in_a_batch_cost_what_their_ranks_do():
    """Prefill with a layer of SmolLM2-135M's sizes: at most 1.05 times the base's FLOPs."""
    config = DecoderConfig(576 * 8, 576, 1536, 1, 9, 3, tie_word_embeddings=True)
    model, tokens = Decoder(config), jnp.ones((64, 128), jnp.int32)
    base = jax.eval_shape(model.init, jax.random.key(0), tokens)
    options = lora.LoraConfig(rank=8, alpha=16)

    def new(base):
        params = lora.init(jax.random.key(0), base, options, model.apply, tokens)
        return lora.stack([lora.split(params)[1]] * 64)

    run = lambda base, stack, x, ids: lora.lora(model.apply, adapters_of=ids)(
        lora.join(base, stack), x
    )
    lowered = jax.jit(run).lower(
        base, jax.eval_shape(new, base), tokens, jax.ShapeDtypeStruct((64,), jnp.int32)
    )
    ours = lowered.cost_analysis()["flops"]
    frozen = jax.jit(model.apply).lower(base, tokens).cost_analysis()["flops"]
    pairs = 2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)  # q, o; k, v; gate, up, down
    branch = 2 * 64 * 128 * 8 * pairs
    assert ours <= 1.05 * frozen
    assert branch <= ours - frozen <= 1.1 * branch
