"""Generation against `transformers` and against passes without a cache, and its sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.models.sampling import Sampling, sample_token
from tests.models.recorded import expected, load

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize(("name", "scan"), [("mistral", False), ("llama_tied", True)])
def test_greedy_tokens_are_those_of_transformers(name, scan):
    """Mistral's window of 4 is long exceeded; the padded second row continues as it would alone."""
    model, given = load(name, scan=scan), expected(name)
    ids, segments = given["ids"], given["mask"]
    cache = model.module.init_cache(2, 20)
    found = models.generate(model.apply, model.params, ids, cache, steps=9, segments=segments)
    np.testing.assert_array_equal(found[:1], given["greedy"])
    apply, alone = jax.jit(model.apply), np.zeros((1, 16), np.int32)
    alone[:, :7] = ids[1:, 4:]
    for i in range(7, 16):
        alone[:, i] = apply(model.params, alone)[:, i - 1].argmax()
    np.testing.assert_array_equal(found[1:], alone[:, 7:])


def test_adapted_and_merged_models_continue_alike():
    model, ids = load("llama"), np.array([[3, 1, 4, 1, 5]])
    config = lora.LoraConfig(rank=2, targets=["query", "value"])
    params = lora.init(jax.random.key(0), model.params, config, model.apply, ids)
    base, adapters = lora.split(params)
    params = lora.join(base, jax.tree.map(lambda leaf: leaf + 0.2, adapters))
    apply = lora.lora(model.apply, on_dense="error")

    def continued(apply, params):
        return models.generate(apply, params, ids, model.module.init_cache(1, 20), steps=12)

    adapted = continued(apply, params)
    np.testing.assert_array_equal(adapted, continued(model.apply, lora.merge(params)))
    assert (adapted != continued(model.apply, model.params)).any()


def counting(length=30):
    """Return a stand-in with logits of token + 1, times 50, and how often it was traced."""
    traces = []

    def apply(params, ids, segments, cache):
        traces.append(ids.shape)
        cache = type(cache)(cache.layers, cache.segments, cache.filled + ids.shape[1])
        return 50.0 * jax.nn.one_hot((ids + 1) % 8, 8), cache

    return apply, traces, lambda batch: load("llama").module.init_cache(batch, length)


def test_rows_stop_and_nothing_is_compiled_again():
    apply, traces, cache = counting()
    prompts, segments = models.left_pad([[0, 1], [5], [3]])
    for stop, wanted in [
        ((7,), [[2, 3, 4, 5, 6, 7], [6, 7, 7, 7, 7, 7], [4, 5, 6, 7, 7, 7]]),
        ((4, 6), [[2, 3, 4], [6, 6, 6], [4, 4, 4]]),
        ([{4}, {6, 7}, ()], [[2, 3, 4, 4, 4, 4, 4], [6] * 7, [4, 5, 6, 7, 0, 1, 2]]),  # per row
        ((), [[2, 3, 4, 5, 6, 7, 0], [6, 7, 0, 1, 2, 3, 4], [4, 5, 6, 7, 0, 1, 2]]),
    ]:
        found = models.generate(apply, {}, prompts, cache(3), steps=7, segments=segments, stop=stop)
        np.testing.assert_array_equal(found, wanted)
    assert traces == [(3, 2), (3, 1)]


def test_tokens_come_one_at_a_time():
    apply, _, cache = counting()
    tokens = models.stream(apply, {}, [[0]], cache(1), steps=5)
    assert [next(tokens).tolist(), next(tokens).tolist()] == [[1], [2]]


def test_draws_have_the_right_frequencies():
    """The probabilities by hand are 4, 2, 1 and 1 eighths; at temperature 2, their square roots."""
    logits = jnp.broadcast_to(jnp.log(jnp.array([1.0, 4.0, 1.0, 2.0])), (20_000, 4))
    roots = np.sqrt([1, 4, 1, 2]) / np.sqrt([1, 4, 1, 2]).sum()
    for options, wanted in [
        ({"temperature": 2.0}, roots),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 3, "top_p": 0.99}, None),
    ]:
        sampling = Sampling(**({"temperature": 1.0} | options))
        drawn = sample_token(logits, jax.random.key(3), sampling)
        found = np.bincount(drawn, minlength=4) / 20_000
        if wanted is None:  # of two equal ones either
            wanted = [
                4 / 7 if i == 1 else 2 / 7 if i == 3 else f and 1 / 7 for i, f in enumerate(found)
            ]
            assert sum(f > 0 for f in found) == 3
        np.testing.assert_allclose(found, wanted, atol=0.015)


def test_a_key_decides():
    model, ids = load("llama"), np.array([[3, 1, 4, 1, 5]])

    def drawn(seed):
        cache = model.module.init_cache(1, 20)
        return models.generate(
            model.apply,
            model.params,
            ids,
            cache,
            steps=9,
            temperature=1.0,
            key=jax.random.key(seed),
        ).tolist()

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 30}, "1 tokens and 30 steps do not fit into a cache with 30 free"),
        ({"temperature": 1.0}, "a temperature above 0 needs key="),
        ({"temperature": -1.0}, "temperature must be 0 or above"),
        ({"temperature": float("nan")}, "temperature must be 0 or above"),
        ({"top_k": -1}, "top_k must be 0 or above"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_options_that_are_refused(options, message):
    apply, _, cache = counting()
    with pytest.raises(ValueError, match=message):
        models.stream(apply, {}, [[0]], cache(1), **({"steps": 5} | options))
