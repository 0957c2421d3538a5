"""Families that need switches of the decoder, against `transformers` 5.24; see record_models.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import models, training
from tests.models.decoder.test_decoder import error
from tests.models.recorded import FIXTURES, NEWER, expected, load

pytestmark = pytest.mark.usefixtures("quick_compile")
#: Where layers differ they are in a scan by default, else not.
ALTERNATING = ("gemma2", "gemma3_text", "smollm3")


def cases(default):
    marks = lambda *case: () if default(*case) else pytest.mark.slow
    both = [(name, scan) for name in NEWER for scan in (False, True)]
    ids = {False: "unrolled", True: "scan"}
    return [pytest.param(*x, marks=marks(*x), id=f"{x[0]}-{ids[x[1]]}") for x in both]


#: Whose switches other families have too.
OTHERS = ("gemma", "gemma3", "gemma3_text", "qwen3")


@pytest.mark.parametrize(
    ("name", "scan"),
    cases(lambda name, scan: name not in OTHERS and scan == (name in ALTERNATING)),
)
def test_logits_are_those_of_transformers(name, scan, strict):
    model, given = load(name, scan=scan), expected(name)
    logits = jax.jit(model.apply)(model.params, given["ids"], given["mask"])
    assert logits.dtype == jnp.float32
    assert error(name, logits) < 3e-5  # for logits up to 5


@pytest.mark.parametrize(("name", "scan"), cases(lambda *case: case == ("gemma3_text", True)))
def test_greedy_tokens_are_those_of_transformers(name, scan):
    """Windows of 4 and 9 tokens are long exceeded; the other row has padding on its left."""
    model, given = load(name, scan=scan), expected(name)
    cache = model.module.init_cache(2, 20)
    found = models.generate(
        model.apply, model.params, given["ids"], cache, steps=9, segments=given["mask"]
    )
    np.testing.assert_array_equal(found[:1], given["greedy"])


@pytest.mark.parametrize(("name", "scan"), cases(lambda name, scan: False))
def test_bfloat16_is_off_by_its_rounding(name, scan):
    model, given = load(name, scan=scan, dtype="bfloat16"), expected(name)
    logits = jax.jit(model.apply)(model.params, given["ids"], given["mask"])
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {logits.dtype}
    rounding = np.abs(given["bfloat16"] - given["logits"])[given["mask"] > 0].max()
    assert rounding < 0.3  # transformers' own, of logits up to 5
    assert error(name, logits) < 1.5 * rounding


@pytest.mark.parametrize("name", NEWER)
def test_saved_tensors_are_those_of_the_file(name, tmp_path):
    model = load(name, scan=name in ALTERNATING)
    models.save(tmp_path, model)
    want, got = (load_file(path / "model.safetensors") for path in (FIXTURES / name, tmp_path))
    assert want.keys() == got.keys()
    for key, tensor in want.items():
        np.testing.assert_array_equal(got[key].view(np.int32), tensor.view(np.int32), key)


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_loss_in_chunks_is_that_of_the_logits(name):
    """The head of the chunked loss caps and scales as the model does; so do its gradients."""
    model, ids = load(name), expected(name)["ids"].astype(np.int32)
    batch = {"ids": ids, "segments": np.ones_like(ids), "weights": np.ones(ids.shape, np.float32)}
    states = np.random.default_rng(0).normal(size=(2, 10, 16)).astype(np.float32) * 3
    table = model.params["embedding"]["embedding"].T
    kernel = table if model.config.tie_word_embeddings else model.params["head"]["kernel"]
    hidden = lambda states, ids, segments: states
    logits = lambda _, states: model.apply(model.params, states, method="logits")
    sums = (
        training.language_sums(lambda states, ids, segments: logits(None, states)),
        training.language_sums_of_frozen_head(hidden, lambda _: kernel, 6, model.module.finish),
        training.language_sums_of_trained_head(hidden, logits, 6),
    )
    of = lambda one: lambda states: one(states, batch)["loss"]
    every = jax.jit(lambda states: [jax.value_and_grad(of(one))(states) for one in sums])
    (loss, slope), *chunked = every(states)
    for found in chunked:
        np.testing.assert_allclose(found[0], loss, rtol=1e-5)
        np.testing.assert_allclose(found[1], slope, rtol=1e-4, atol=1e-6)
    plain = training.language_sums_of_frozen_head(hidden, lambda _: kernel, 6)
    assert abs(of(plain)(states) - loss) > 0.1 * loss


@pytest.mark.slow
def test_packed_texts_do_not_see_each_other():
    """Alternating windows in a scan: no text sees another one, and none sees beyond its window."""
    model = load("gemma3_text", scan=True)
    ids = np.arange(1, 16)[None]
    segments = np.array([[1] * 8 + [2] * 6 + [0]])
    apply = jax.jit(model.apply)
    packed = apply(model.params, ids, segments)
    for text in (slice(0, 8), slice(8, 14)):
        alone = np.zeros_like(ids)
        length = text.stop - text.start
        alone[:, :length] = ids[:, text]
        own = apply(model.params, alone, (np.arange(15)[None] < length).astype(int))
        np.testing.assert_allclose(packed[:, text], own[:, :length], atol=2e-5, rtol=0)
