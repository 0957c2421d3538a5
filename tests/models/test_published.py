"""The config.json of published models: sizes as on their pages and as transformers reads them.

Those of decoders are recorded with 5.24, see record_published.py; those of other models were
counted with it, without what is kept beside the model here: poolers, and heads of masked language
models.
"""

import itertools
import json
import math

import jax
import pytest

from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.families import family_of
from lora_jax.models.weights.family import Options
from tests.models.recorded import FIXTURES

PUBLISHED = json.loads((FIXTURES / "published.json").read_text())  # decoders
OTHERS = json.loads((FIXTURES / "published_others.json").read_text())
#: Of which parameters are counted by default: old keys, a nested text, experts; two towers, audio.
COUNTED = (
    *("huggyllama/llama-7b", "google/gemma-3-4b-pt", "openai/gpt-oss-20b"),
    *("ModernBERT-base", "clip-vit-large-patch14", "whisper-large-v3-turbo"),
)


def module_of(settings):
    return family_of(settings).module(settings, Options("bfloat16", True, False))


def edited(settings, rename, without=()):
    """Return settings with other names of their keys, without some, also in text_config."""
    inner = {k: edited(v, rename, without) for k, v in settings.items() if k == "text_config"}
    return {rename.get(k, k): inner.get(k, v) for k, v in settings.items() if k not in without}


@pytest.mark.parametrize("name", PUBLISHED)
def test_windows_and_rotations_are_those_of_transformers(name):
    config, theirs = module_of(PUBLISHED[name]["config"]).config, PUBLISHED[name]["transformers"]
    assert isinstance(config, DecoderConfig)
    if theirs is None:
        return
    windows = [kind.window for kind in config.layer_kinds]
    assert [[x, len([*same])] for x, same in itertools.groupby(windows)] == theirs["windows"]
    for key, total in theirs["frequencies"].items():
        rope = config.local_rope if key.startswith("sliding") else config.rope
        assert rope.frequencies(config.head_dim).sum() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=() if x in COUNTED else pytest.mark.slow)
        for x in (*PUBLISHED, *OTHERS)
    ],
)
def test_parameters_are_as_many_as_published(name):
    row = (PUBLISHED | OTHERS)[name]
    module = module_of(row["config"])
    inputs = family_of(row["config"]).inputs(module)
    made = jax.eval_shape(module.init, jax.random.key(0), **inputs)["params"]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(made)) == row["parameters"]
    if theirs := row.get("transformers"):
        assert row["parameters"] == theirs["parameters"]


#: Keys that versions of transformers write otherwise, where the model stays the same.
OTHERWISE = (
    ({"torch_dtype": "dtype"}, ()),
    ({"rope_scaling": "rope_parameters"}, ()),
    ({}, ("torch_dtype", "tie_word_embeddings")),
    ({}, ("architectures", "use_cache", "initializer_range", "attention_dropout")),
)


@pytest.mark.parametrize(("rename", "without"), OTHERWISE)
def test_other_keys_of_the_same_model_mean_the_same(rename, without):
    for name, row in PUBLISHED.items():
        given = row["config"]
        if "tie_word_embeddings" in without and given.get("tie_word_embeddings", False):
            continue  # then the default is another one
        assert module_of(edited(given, rename, without)).config == module_of(given).config, name


def test_a_head_size_or_heads_that_are_absent_or_null_follow_from_the_others():
    given = PUBLISHED["meta-llama/Llama-3.2-1B"]["config"]
    want = module_of(given).config
    assert module_of(edited(given, {}, ["head_dim"])).config == want
    assert module_of(given | {"head_dim": None}).config == want
    first = PUBLISHED["huggyllama/llama-7b"]["config"]
    assert module_of(first | {"num_key_value_heads": None}).config.num_key_value_heads == 32
    assert module_of(first).config == module_of(first | {"num_key_value_heads": 32}).config
    mistral = PUBLISHED["mistralai/Mistral-7B-v0.1"]["config"]
    absent = edited(mistral, {}, ["num_key_value_heads"])
    assert module_of(absent).config.num_key_value_heads == 8  # its class's default
    assert module_of(mistral | {"num_key_value_heads": None}).config.num_key_value_heads == 32
