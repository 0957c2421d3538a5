"""Mixtures of experts in a batch with many adapters: one sort, one base product, no copies."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.engine.rows.groups import Tiles
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.experts import ExpertsConfig
from lora_jax.models.decoder.module import Decoder
from tests.programs import is_node, merged
from tests.programs.jaxprs import equations

# No two sizes are equal, so a shape says what an array is.
ROWS, TIME, WIDTH, HIDDEN, EXPERTS, SLOTS, RANK = 3, 7, 16, 20, 6, 2, 5
IDS = [1, -1, 0]
TOKENS = jax.random.randint(jax.random.key(1), (ROWS, TIME), 0, 31)


def model_of(**options):
    experts = ExpertsConfig(EXPERTS, 2, HIDDEN, "normalized", bias=True)
    return Decoder(DecoderConfig(31, WIDTH, 24, 1, 2, 1, experts=experts, **options))


def stack_of(model, base, **options):
    def new(seed):
        config = lora.LoraConfig(rank=RANK, alpha=4, **options)
        params = lora.init(jax.random.key(seed), base, config, model.apply, TOKENS)
        add = lambda x: x + jax.random.normal(jax.random.key(seed), x.shape) / 5
        return jax.tree.map(lambda x: add(x) if x.ndim > 1 else x, lora.split(params)[1])

    return lora.stack([new(seed) for seed in range(SLOTS)])


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, {"targets": ["query", "experts"]}),
        pytest.param({"scan": True, "remat": True}, {"dora": True}, marks=pytest.mark.slow),
        pytest.param({"scan": True}, {"targets": ["query", "value"]}, marks=pytest.mark.slow),
    ],
    ids=["unrolled", "scanned-dora", "attention"],
)
def test_logits_and_gradients_are_those_of_each_row_alone(options, kind, quick_compile):
    """Alone a row has merged weights, and its gradients come from that sum."""
    model = model_of(**options)
    base = jax.jit(model.init)(jax.random.key(0), TOKENS)
    stack = stack_of(model, base, **kind)

    def mixed(stack):
        run = lora.lora(model.apply, adapters_of=jnp.array(IDS), on_dense="error")
        logits = run(lora.join(base, stack), TOKENS)
        return jnp.sin(logits).sum(), logits

    def alone(stack):
        own = lambda i: merged(lora.join(base, lora.select(stack, i)))
        params = [base if i < 0 else own(i) for i in range(-1, SLOTS)]
        rows = [model.apply(params[i + 1], TOKENS[n : n + 1]) for n, i in enumerate(IDS)]
        logits = jnp.concatenate(rows)
        return jnp.sin(logits).sum(), logits

    both = lambda stack: [jax.grad(x, has_aux=True)(stack) for x in (mixed, alone)]
    (moved, got), (wanted_moves, want) = jax.jit(both)(stack)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6)
    pairs = (jax.tree.leaves(x, is_leaf=is_node) for x in (moved, wanted_moves))
    for one, two in zip(*pairs, strict=True):
        for got, want in ((one.a, two.a), (one.b, two.b)):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * jnp.abs(want).max() + 1e-6)


def test_nothing_of_an_experts_size_is_made_per_row_or_per_token():
    model = model_of()
    base = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    stack = jax.eval_shape(lambda: stack_of(model, jax.tree.map(jnp.ones_like, base)))

    def loss(stack, base, ids):
        run = lora.lora(model.apply, adapters_of=ids)
        return run(lora.join(base, stack), TOKENS).sum()

    ids = jnp.array(IDS)
    found = [
        Counter(v.aval.shape)
        for eqn in equations(jax.make_jaxpr(jax.grad(loss))(stack, base, ids).jaxpr)
        for v in eqn.outvars
    ]
    entries = ROWS * TIME * 2
    for made in found:
        for sizes in [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]:
            for lead in [ROWS, SLOTS, entries]:
                assert not Counter((lead, *sizes)) <= made
        for width in (WIDTH, HIDDEN):
            assert not Counter((entries, width, RANK)) <= made
    jaxpr = jax.make_jaxpr(loss)(stack, base, ids).jaxpr
    assert sum(eqn.primitive.name == "ragged_dot_general" for eqn in equations(jaxpr)) == 3


@pytest.mark.parametrize("entries", [6, 53])
def test_entries_in_tiles_meet_the_factor_of_their_group(entries, quick_compile):
    """Groups of all sizes, none among them; fewer entries than groups are not sorted."""
    rng = np.random.default_rng(0)
    group = np.minimum(rng.geometric(0.3, entries) - 1, 9) % 8  # 7 stands for none
    x, factors = rng.normal(size=(entries, 3)), rng.normal(size=(7, 3, 5))

    @jax.jit
    def run(x, factors, group):
        tiles = Tiles.of(group, 7)
        assert tiles.length == max(1, entries // 7)
        return tiles.join(tiles.multiply(tiles.split(x), factors, None, jnp.float32))

    own = np.concatenate([factors, np.zeros((1, 3, 5))])[group]
    want = np.einsum("nd,ndf->nf", x, own)
    np.testing.assert_allclose(run(x, factors, group), want, rtol=0, atol=3e-6)
