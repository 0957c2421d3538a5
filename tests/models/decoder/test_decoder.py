"""Llama, Mistral and Qwen2 against `transformers`' logits, and under `lora`."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.rope import Rope
from tests.models.recorded import CAUSAL, FIXTURES, expected, load
from tests.programs import normal

pytestmark = pytest.mark.usefixtures("quick_compile")
TINY = DecoderConfig(
    vocab_size=19,
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=32,
)


def error(name, logits):
    """Return the largest difference from PyTorch's logits, ignoring padding."""
    given = expected(name)
    difference = np.abs(np.asarray(logits, np.float32) - given["logits"])
    return difference[given["mask"] > 0].max()


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("name", CAUSAL)
def test_logits_are_those_of_transformers(name, scan, strict):
    model, given = load(name, scan=scan), expected(name)
    logits = jax.jit(model.apply)(model.params, given["ids"], given["mask"])
    assert logits.dtype == jnp.float32
    assert error(name, logits) < 2e-5  # for logits up to 6.7


@pytest.mark.parametrize(("name", "scan"), [("llama", False), ("qwen2", True)])
def test_bfloat16_is_off_by_its_rounding(name, scan):
    model, given = load(name, scan=scan, dtype="bfloat16"), expected(name)
    logits = jax.jit(model.apply)(model.params, given["ids"], given["mask"])
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {logits.dtype}
    rounding = np.abs(given["bfloat16"] - given["logits"])[given["mask"] > 0].max()
    assert error(name, logits) < 1.5 * rounding < 0.25


@pytest.mark.parametrize(("name", "scan"), [("llama", True), ("mistral", False)])
def test_with_a_cache_the_logits_are_the_same(name, scan):
    """The prompt has six tokens, padded on the left in one row; then one token at a time."""
    model, given = load(name, scan=scan), expected(name)
    cache, parts = model.module.init_cache(2, 13), []
    step = jax.jit(model.apply)
    for start, stop in [(0, 6), *((i, i + 1) for i in range(6, 11))]:
        ids, mask = (given[x][:, start:stop] for x in ("ids", "mask"))
        logits, cache = step(model.params, ids, mask, cache)
        parts.append(logits)
    assert error(name, jnp.concatenate(parts, 1)) < 2e-5
    assert cache.filled == 11


def test_packed_texts_do_not_see_each_other():
    model = load("llama")
    ids, segments = np.arange(1, 10)[None], np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    apply = jax.jit(model.apply)
    packed = apply(model.params, ids, segments)
    for text in (slice(0, 4), slice(4, 7)):
        alone = apply(model.params, ids[:, text])
        np.testing.assert_allclose(packed[:, text], alone, atol=2e-5, rtol=0)


def test_hidden_and_head_are_the_logits():
    model = load("qwen2")
    hidden = jax.jit(model.apply, static_argnames="method")(
        model.params, expected("qwen2")["ids"][:1], method="hidden"
    )
    assert hidden.shape == (1, 11, 32)
    logits = model.apply(model.params, hidden, method="logits")
    given = expected("qwen2")["logits"][:1]
    np.testing.assert_allclose(logits, given, atol=2e-5, rtol=0)


def drawn(path, x):
    """Draw the scales of norms around one, other parameters around zero."""
    center = 1 if path[-1].key == "scale" else 0
    return jax.device_put(np.asarray(normal(x.size, x.shape, x.dtype, 0.3)) + x.dtype.type(center))


@pytest.mark.parametrize(
    "scan", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unrolled", "scan"]
)
def test_adapters_stay_lazy_and_train(scan):
    """In prefill, decoding and gradients; `on_dense="error"` would refuse to densify a weight."""
    layers = 2 if scan else 1
    config = dataclasses.replace(
        TINY, scan=scan, remat=True, tie_word_embeddings=scan, num_hidden_layers=layers
    )
    model = Decoder(config)
    ids = np.random.default_rng(0).integers(0, 19, (2, 8), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(1), ids)
    params = jax.tree_util.tree_map_with_path(drawn, shapes)
    targets = r".*(query|value|up)/kernel|.*embedding/embedding"
    adapted = lora.init(
        jax.random.key(2), params, lora.LoraConfig(rank=2, targets=targets), model.apply, ids
    )
    base, adapters = lora.split(adapted)
    apply = lora.lora(model.apply, on_dense="error")

    @jax.jit
    def step(adapters):
        def loss(adapters):
            logits = jax.nn.log_softmax(apply(lora.join(base, adapters), ids[:, :-1]))
            return -jnp.take_along_axis(logits, ids[:, 1:, None], -1).mean()

        value, grads = jax.value_and_grad(loss)(adapters)
        return value, jax.tree.map(lambda a, g: a - 0.3 * g, adapters, grads)

    losses = []
    for _ in range(8):
        value, adapters = step(adapters)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.2

    adapted = lora.join(base, adapters)
    merged = jax.jit(model.apply)(lora.merge(adapted), ids)
    cache, run = model.init_cache(2, 8), jax.jit(apply)
    first, cache = run(adapted, ids[:, :7], None, cache)
    last, cache = run(adapted, ids[:, 7:], None, cache)
    both = jnp.concatenate([first, last], 1)
    np.testing.assert_allclose(both, merged, atol=2e-5, rtol=0)


def test_every_linear_layer_is_found():
    ids = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    for config in (TINY, dataclasses.replace(TINY, scan=True)):
        model = Decoder(config)
        params = jax.eval_shape(model.init, jax.random.key(0), ids)
        adapted = lora.init(jax.random.key(0), params, lora.LoraConfig(rank=2), model.apply, ids)
        found = [line for line in str(lora.summary(adapted)).splitlines() if "matmul" in line]
        assert len(found) == (7 if config.scan else 14) + any("head" in line for line in found)


def settings(**changes):
    found = json.loads((FIXTURES / "llama" / "config.json").read_text()) | changes
    return {name: value for name, value in found.items() if value != "left out"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "t5"}, r"model_type 't5' is not one of \['exaone4', 'gemma', "),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "need an even head_dim, got 7"),
        ({"hidden_size": 0}, "hidden_size must be a positive int, got 0"),
        ({"hidden_size": "32"}, "hidden_size must be a positive int, got '32'"),
        ({"hidden_size": "32", "head_dim": "left out"}, "hidden_size must be a positive int"),
        ({"model_type": ["llama"]}, "model_type .* is not one of"),
        ({"num_hidden_layers": "2", "model_type": "mistral"}, "num_hidden_layers must be"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type .* is not supported"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive int"),
        ({"vocab_size": "left out", "hidden_size": None}, "has no vocab_size, hidden_size"),
        ({"hidden_act": "selu"}, r"hidden_act 'selu' is not one of \['gelu', "),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        ({"quantization_config": {"bits": 4}}, "a quantization_config"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type 'ntk' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' needs factor"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": 2}},
            "rope: long_factor must be a list of positive numbers",
        ),
        (
            {"model_type": "phi3"}
            | {"rope_parameters": {"rope_type": "su", "short_factor": [1], "long_factor": [1]}},
            "rope: short_factor has 1 numbers, but 4 pairs of a head are rotated",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
        ({"rope_parameters": [2.0]}, "rope_scaling must be a mapping"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor must be a positive"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported for"),
        ({"partial_rotary_factor": 0.6, "model_type": "phi3", "head_dim": 5}, "of which 3 are"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive int"),
        ({"model_type": "gemma2", "layer_types": ["sliding_attention"]}, "has 1 entries for 2"),
        ({"model_type": "gemma2", "layer_types": ["local"]}, "layer_types has 'local', which is"),
        ({"model_type": "gemma2", "sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        ({"model_type": "gemma2", "final_logit_softcapping": -1}, "final_cap must be a positive"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": "1"}, "query_pre_attn_scalar must be"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_att"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must be a list"),
        ({"model_type": "granite", "logits_scaling": "8"}, "logits_scaling must be a positive"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_json(settings(**changes))


def test_configurations_of_older_files():
    """transformers 4 wrote `rope_theta` and `rope_scaling`; several fields may be left out."""
    old = {"rope_parameters": "left out", "rope_theta": 500.0, "num_key_value_heads": None}
    scaling = {"type": "linear", "factor": 2.0}
    config = DecoderConfig.from_json(settings(**old, rope_scaling=scaling, head_dim="left out"))
    assert config.rope == Rope(500.0, "linear", 2.0)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert DecoderConfig.from_json(settings(model_type="mistral")).sliding_window == 4096
    assert DecoderConfig.from_json(settings(sliding_window=7)).sliding_window is None
    windows = {"model_type": "qwen2", "sliding_window": 4, "max_window_layers": 0}
    assert DecoderConfig.from_json(settings(**windows)).sliding_window is None
    windows["use_sliding_window"] = True
    assert DecoderConfig.from_json(settings(**windows)).sliding_window == 4
    some = DecoderConfig.from_json(settings(**windows | {"max_window_layers": 1}))
    assert [kind.window for kind in some.layer_kinds] == [None, 4]


def test_too_many_tokens():
    model = Decoder(TINY)
    ids = jax.ShapeDtypeStruct((1, 33), jnp.int32)
    with pytest.raises(ValueError, match="length 33 is above max_position_embeddings 32"):
        jax.eval_shape(model.init, jax.random.key(0), ids)
    with pytest.raises(ValueError, match="length 33 is above max_position_embeddings 32"):
        model.init_cache(1, 33)
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="4 tokens do not fit into a cache with 3 slots"):
        jax.eval_shape(model.apply, params, jnp.zeros((1, 4), int), None, model.init_cache(1, 3))


def test_gemma_3_in_older_files():
    """transformers 4 wrote both bases, and the scaling of layers that see all tokens, apart."""
    new = json.loads((FIXTURES / "gemma3_text" / "config.json").read_text())
    old = {key: x for key, x in new.items() if key != "rope_parameters"}
    scaling = {"rope_type": "linear", "factor": 8.0}
    old |= {"rope_theta": 1000.0, "rope_local_base_freq": 50.0, "rope_scaling": scaling}
    config = DecoderConfig.from_json(old)
    assert config == DecoderConfig.from_json(new)
    assert config.local_rope == Rope(50.0)
    del old["layer_types"]
    assert [x.window for x in DecoderConfig.from_json(old).layer_kinds] == [4, 4, 4, 4]
    six = DecoderConfig.from_json(old | {"num_hidden_layers": 7})
    assert [x.window for x in six.layer_kinds] == [4, 4, 4, 4, 4, None, 4]
