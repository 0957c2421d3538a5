"""The loss in chunks against the whole one: values, gradients, and what is never in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.training import batching, chunked_loss, loss
from tests.programs.jaxprs import equations
from tests.training import tiny_model
from tests.training.test_loss import EXAMPLES

TARGETS = {"frozen": ["query", "value"], "trained": ["query", "value", "head"]}
SUMS = {
    "frozen": lambda chunk: chunked_loss.language_sums_of_frozen_head(
        tiny_model.hidden, lambda p: p["head"], chunk
    ),
    "trained": lambda chunk: chunked_loss.language_sums_of_trained_head(
        tiny_model.hidden, tiny_model.head, chunk
    ),
}


@pytest.mark.parametrize("chunk", [3, 64, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", SUMS)
def test_equals_the_whole_loss(x64, head, chunk):
    """Values and gradients agree to the last digits, in one, several and uneven chunks."""
    config = lora.LoraConfig(rank=2, targets=TARGETS[head], dtype=jnp.float64)
    base, adapters = tiny_model.adapters(config, dtype=jnp.float64)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    batch = batching.pack_examples(EXAMPLES, 8).arrays
    whole = lora.lora(loss.language_sums(tiny_model.apply))
    results = []
    for sums in (whole, lora.lora(SUMS[head](chunk), on_dense="error")):
        of = lambda a, sums=sums: 3 * sums(lora.join(base, a), batch)["loss"]
        results.append(jax.jit(jax.value_and_grad(of))(adapters))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("head", "products"), [("frozen", [1, 2]), ("trained", [1, 3])])
def test_no_logits_of_all_tokens(head, products):
    """The head meets the states, their gradient and, where it trains, the states once more."""
    batch = batching.pack_examples(EXAMPLES * 8, 8).arrays
    tokens, sizes = batch["ids"][:, 1:].size, (tiny_model.WIDTH, tiny_model.VOCABULARY)
    base, adapters = tiny_model.adapters(lora.LoraConfig(rank=2, targets=TARGETS[head]))
    sums = lora.lora(SUMS[head](4 * len(batch["ids"])))
    of = lambda a: sums(lora.join(base, a), batch)["loss"]
    made = []
    for jaxpr in (jax.make_jaxpr(of)(adapters), jax.make_jaxpr(jax.grad(of))(adapters)):
        arrays = [v.aval.shape for eqn in equations(jaxpr) for v in eqn.outvars]
        logits = [x for x in arrays if x and x[-1] == tiny_model.VOCABULARY]
        assert max(np.prod(x) for x in logits) == tokens // 2 * tiny_model.VOCABULARY
        made.append(products_with(jaxpr, sizes))
    assert made == products


def products_with(jaxpr, shape):
    """Count the products with an operand of that shape, in inner programs too."""
    return sum(
        eqn.primitive.name == "dot_general" and any(x.aval.shape == shape for x in eqn.invars)
        for eqn in equations(jaxpr)
    )


def test_small_logits_of_a_trained_head_are_whole(monkeypatch):
    """They cost no recomputation; beyond the limit they are in chunks."""
    batch = batching.pack_examples(EXAMPLES * 8, 8).arrays
    params, sums = tiny_model.params(), SUMS["trained"](None)
    count = lambda: products_with(
        jax.make_jaxpr(jax.grad(lambda p: sums(p, batch)["loss"]))(params),
        (tiny_model.WIDTH, tiny_model.VOCABULARY),
    )
    assert count() == 2
    monkeypatch.setattr(chunked_loss, "WHOLE", 1)
    assert count() == 3


@pytest.mark.parametrize("head", SUMS)
def test_memory_does_not_grow_with_the_logits(head, optimized):
    """Twice the tokens take less than half of what their logits would."""
    vocabulary, width = 4096, 4
    params = {"head": jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)}
    config = lora.LoraConfig(rank=1, targets=["head"])
    hidden = lambda params, ids, segments: ids[..., None] * params["scale"][None, None]
    adapted = lora.init(jax.random.key(0), params, config, tiny_model.head, jnp.ones((1, width)))
    adapted = adapted if head == "trained" else params
    sums = {
        "frozen": chunked_loss.language_sums_of_frozen_head(hidden, lambda p: p["head"]),
        "trained": chunked_loss.language_sums_of_trained_head(hidden, tiny_model.head),
    }[head]

    def temporaries(length):
        batch = {
            name: jax.ShapeDtypeStruct((2, length + 1), dtype)
            for name, dtype in (("ids", "int32"), ("segments", "int32"), ("weights", "float32"))
        }
        run = lora.lora(lambda params, batch: sums(params, batch)["loss"])
        one = lambda scale, params, batch: run({**params, "scale": scale}, batch)
        compiled = jax.jit(jax.grad(one)).lower(jnp.ones(width), adapted, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long - short < 0.1 * 4 * 2 * (4096 - 1024) * vocabulary
    assert long < 4 * 4 * chunked_loss.CHUNK * vocabulary
