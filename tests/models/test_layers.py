"""Layers stacked in a scan, and what they recompute: as layers that are neither."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.files import naming
from tests.models import recorded
from tests.models.encoder.test_recorded import same_tensors

NAMES = ("bert", "roberta", "modernbert", "vit", "siglip_vision", "siglip", "clip", "whisper")
DEFAULT = ("modernbert",)  # two kinds of layers, the first of which is not stacked
CASES = [pytest.param(x, marks=() if x in DEFAULT else pytest.mark.slow) for x in NAMES]


def loss(name, model):
    """Return a number that depends on all parameters of the layers."""
    want = recorded.expected(name)
    if model.kind == "encoder":
        given = {"ids": want["ids"], "segments": want["mask"]}
    elif model.kind == "speech":
        given = {"ids": want["ids"], "features": want["features"]}
    else:
        given = {key: want[key] for key in ("pixels", "ids")[: 1 + (name in ("siglip", "clip"))]}
    return lambda params: jnp.sin(model.apply(params, **given)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_scan_that_recomputes_gives_the_same_gradients(name, quick_compile):
    found = []
    for options in ({}, {"scan": True, "remat": "full"}):
        model = recorded.load(name, **options)
        value, slope = jax.jit(jax.value_and_grad(loss(name, model)))(model.params)
        found.append((value, naming.to_torch(model.naming, slope)))
    (one, plain), (other, stacked) = found
    np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert plain.keys() == stacked.keys()
    for key, x in plain.items():
        np.testing.assert_allclose(stacked[key], x, rtol=1e-5, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_files_of_stacked_layers_are_those_read(name, tmp_path):
    models.save(tmp_path, recorded.load(name, scan=True))
    file = "model.safetensors"
    same_tensors(tmp_path / file, recorded.FIXTURES / name / file)


@pytest.mark.slow
def test_what_is_said_with_stacked_layers(quick_compile):
    model, want = recorded.load("whisper", scan=True), recorded.expected("whisper")
    ids, features = want["ids"][:, :2], want["features"]
    found = models.transcribe(model.apply, model.params, features, ids, steps=9)
    np.testing.assert_array_equal(found, want["greedy"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["roberta", "vit"])
def test_later_policies_take_less_memory(name, optimized):
    none, sums, full = (temporaries(name, remat) for remat in ("none", "sums", "full"))
    assert none > sums > full


def temporaries(name, remat):
    """Return the bytes of temporaries of a gradient through twelve layers in a scan."""
    model = recorded.load(name, scan=True, remat=remat)
    config = dataclasses.replace(model.config, num_hidden_layers=12)
    deep = dataclasses.replace(model, module=model.module.clone(config=config))
    grow = lambda path, x: jnp.zeros((12, *x.shape[1:])) if "layers" in str(path) else x
    params = jax.tree_util.tree_map_with_path(grow, model.params)
    targets, given = lora.LoraConfig(rank=2, targets=["query/kernel"]), loss(name, deep)
    base, adapters = lora.split(lora.init(jax.random.key(0), params, targets, given))
    step = jax.grad(lambda adapters: lora.lora(given)(lora.join(base, adapters)))
    return jax.jit(step).lower(adapters).compile().memory_analysis().temp_size_in_bytes
