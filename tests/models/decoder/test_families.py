"""Families that need switches of the decoder, against `transformers` 5.24; see record_models.py."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import models, training
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.layer_choice import FULL, SLIDING
from lora_jax.models.families import family_of
from lora_jax.models.weights.family import Options
from tests.models.decoder.test_decoder import error
from tests.models.recorded import FIXTURES, NEWER, ROWS, expected, load

pytestmark = pytest.mark.usefixtures("quick_compile")
#: Where layers differ they are in a scan by default, else not.
ALTERNATING = ("gemma2", "gemma3_text", "smollm3", "olmo3", "exaone4")
GELU = {"hidden_act": "gelu_pytorch_tanh"}


def cases(default):
    marks = lambda *case: () if default(*case) else pytest.mark.slow
    both = [(name, scan) for name in (*NEWER, *ROWS) for scan in (False, True)]
    ids = {False: "unrolled", True: "scan"}
    return [pytest.param(*x, marks=marks(*x), id=f"{x[0]}-{ids[x[1]]}") for x in both]


#: Whose switches other families have too.
OTHERS = ("gemma", "gemma3", "gemma3_text", "qwen3", *ROWS)


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
    seen = given["mask"] > 0
    far = lambda x: np.sqrt(np.square(np.asarray(x, np.float64) - given["logits"])[seen].mean())
    theirs = far(given["bfloat16"])
    assert theirs < 0.1  # of logits up to 5
    assert far(logits) < 1.2 * theirs  # 0.78 to 1.14 times


@pytest.mark.parametrize("name", [*NEWER, *ROWS])
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
        np.testing.assert_allclose(found[1], slope, rtol=1e-5, atol=1e-7)
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


#: What transformers 5.24 computes where a file says this, though other families mean another thing.
MEANINGS = (
    ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
    ("gemma2", {"hidden_activation": "gelu"}, {"hidden_act": "gelu"}),
    ("gemma2", {"hidden_activation": None, "hidden_act": "relu"}, GELU),
    ("gemma3_text", {"attn_logit_softcapping": 5.0}, {"attention_cap": None}),
    ("gemma3_text", {"final_logit_softcapping": 5.0}, {"final_cap": 5.0}),
    ("gemma3", {"final_logit_softcapping": 5.0}, {"final_cap": None}),  # only that of text has one
    ("qwen2", {"attention_bias": False}, {"attention_bias": True, "output_bias": False}),
    ("mistral", {"attention_bias": True, "mlp_bias": True}, {"attention_bias": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}, {"output_bias": True, "mlp_bias": True}),
    ("phi3", {"sliding_window": 4, "layer_types": ["full_attention"] * 2}, {"layer_types": ()}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}, {"layer_types": ()}),
    (
        "smollm3",
        {"use_sliding_window": False, "sliding_window": 4, "layer_types": [FULL, SLIDING]},
        {"layer_types": (FULL, SLIDING), "sliding_window": 4},
    ),
    ("exaone4", {"sliding_window": None}, {"unrotated_layers": (), "sliding_window": None}),
    ("exaone4", {"sliding_window_pattern": 2}, {"unrotated_layers": (1,), "sliding_window": 4096}),
    ("qwen3_moe", {"decoder_sparse_step": 3}, {"experts": None, "dense_layers": ()}),
)


@pytest.mark.parametrize(("model_type", "given", "want"), MEANINGS)
def test_what_a_key_means_in_a_family(model_type, given, want):
    sizes = dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size"], 8)
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes["head_dim"] = 4
    settings = {"text_config": sizes | given} if model_type == "gemma3" else sizes | given
    settings["model_type"] = model_type
    config = family_of(settings).module(settings, Options("float32", False, False)).config
    assert {name: getattr(config, name) for name in want} == want


def test_rotations_where_a_file_is_silent():
    """gpt-oss without a rotation, or with null, has YaRN's; Phi-3's original length is 4096."""
    sizes = dict.fromkeys(["vocab_size", "hidden_size", "intermediate_size"], 8)
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8}
    for given in ({}, {"rope_scaling": None, "rope_theta": 50.0}):
        rope = DecoderConfig.from_json({"model_type": "gpt_oss", **sizes, **given}).rope
        assert (rope.kind, rope.factor, rope.theta) == ("yarn", 32, given.get("rope_theta", 150000))
    long = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    long |= {"original_max_position_embeddings": 16}
    phi = {"model_type": "phi3", **sizes, "max_position_embeddings": 8192, "rope_scaling": long}
    assert DecoderConfig.from_json(phi).rope.original_max_position_embeddings == 4096


def test_which_original_length_counts():
    """Beside one rotation that of the file, as in Phi-3's; of two rotations each has its own."""
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    settings = json.loads((FIXTURES / "gemma3_text" / "config.json").read_text())
    settings |= {"max_position_embeddings": 64, "original_max_position_embeddings": 12}
    both = {"full_attention": scaling, "sliding_attention": {**scaling}}
    del both["sliding_attention"]["original_max_position_embeddings"]
    found = DecoderConfig.from_json(settings | {"rope_parameters": both})
    assert found.rope.original_max_position_embeddings == 8
    assert found.local_rope.original_max_position_embeddings == 64
    one = {"model_type": "llama", "rope_parameters": scaling}
    assert DecoderConfig.from_json(settings | one).rope.original_max_position_embeddings == 12


def test_padding_does_not_make_a_text_long():
    """longrope's long factors are for texts beyond 8 tokens, not for rows that are padded so far.

    That transformers computes the same is in the recorded logits, of 11 and 7 tokens.
    """
    model, given = load("phi3"), expected("phi3")
    ids = given["ids"][:, :6]
    short = jax.jit(model.apply)(model.params, ids)
    more = [(0, 0), (0, 12)]
    padded = jax.jit(model.apply)(model.params, np.pad(ids, more), np.pad(np.ones_like(ids), more))
    np.testing.assert_allclose(padded[:, :6], short, atol=1e-5, rtol=0)
