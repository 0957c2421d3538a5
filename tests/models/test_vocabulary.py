"""Another number of tokens, and a head apart from the embedding."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models, peft
from lora_jax.core.errors import ConfigError, StructureError
from lora_jax.files.disk import safetensors_file
from tests.models.recorded import FIXTURES, load

pytestmark = pytest.mark.usefixtures("quick_compile")

IDS = np.array([[3, 17, 5, 9, 11, 63, 1]])
ROWS = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llama", True),
        ("llama_tied", False),
        pytest.param("llama", False, marks=SLOW),
        pytest.param("llama_tied", True, marks=SLOW),
        pytest.param("qwen2", True, marks=SLOW),
        pytest.param("qwen2", False, marks=SLOW),
    ],
)
def test_old_tokens_keep_their_logits_and_new_ones_have_their_rows(name, given):
    """A new token's logit is the product of the last state and its row: by hand in float64."""
    model = load(name)
    is_tied = model.config.tie_word_embeddings
    rows = {"embedding": ROWS[0], "head": ROWS[1]} if given else {}
    if is_tied:
        rows.pop("head", None)
    grown = models.resize_vocabulary(model, 67, **rows)
    before, after = (jax.jit(m.apply)(m.params, IDS) for m in (model, grown))
    assert after.shape == (1, 7, 67)
    np.testing.assert_allclose(after[..., :64], before, rtol=1e-5, atol=1e-5)
    embedding = np.asarray(model.params["embedding"]["embedding"], np.float64)
    head = embedding if is_tied else np.asarray(model.params["head"]["kernel"], np.float64).T
    states = jax.jit(lambda params: model.apply(params, IDS, method="hidden"))
    hidden = np.asarray(states(model.params), np.float64)
    new = ROWS[0 if is_tied else 1] if given else np.repeat(head.mean(0)[None], 3, 0)
    np.testing.assert_allclose(after[..., 64:], hidden @ new.T, rtol=1e-4, atol=1e-5)
    new = ROWS[0] if given else np.repeat(embedding.mean(0)[None], 3, 0)
    np.testing.assert_allclose(grown.params["embedding"]["embedding"][64:], new, atol=1e-6)
    assert model.params["embedding"]["embedding"].shape == (64, 32)  # as it was


def test_fewer_tokens():
    model = load("llama")
    small = models.resize_vocabulary(model, 20)
    ids = IDS % 20
    before, after = (jax.jit(m.apply)(m.params, ids) for m in (model, small))
    np.testing.assert_allclose(after, before[..., :20], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=SLOW)])
def test_an_untied_head_gives_the_same_logits_until_it_is_trained(dtype):
    model = load("qwen2", dtype=dtype)
    untied = models.untie_head(model)
    before, after = (jax.jit(m.apply)(m.params, IDS) for m in (model, untied))
    np.testing.assert_array_equal(before, after)
    head = untied.params["head"]["kernel"] * 2
    changed = jax.jit(untied.apply)({**untied.params, "head": {"kernel": head}}, IDS)
    np.testing.assert_array_equal(changed, 2 * after)  # a power of two


@pytest.mark.parametrize(
    "change", [*(pytest.param(x, marks=SLOW) for x in ("resize", "untie")), "both"]
)
def test_the_saved_model_is_read_again(change, tmp_path):
    model = load("qwen2")
    model = model if change == "untie" else models.resize_vocabulary(model, 70)
    model = model if change == "resize" else models.untie_head(model)
    models.save(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == (64 if change == "untie" else 70)
    assert config["tie_word_embeddings"] == (change == "resize")
    again = models.load(tmp_path)
    assert again.config == model.config
    ids = IDS + (config["vocab_size"] - 64)
    got, want = (jax.jit(m.apply)(m.params, ids) for m in (again, model))
    np.testing.assert_array_equal(got, want)


def test_bert_and_its_own_head(tmp_path):
    tensors, metadata = safetensors_file.read(FIXTURES / "bert" / "model.safetensors")
    tensors["cls.predictions.bias"] = np.ones(64, np.float32)
    tensors["cls.predictions.decoder.weight"] = np.ones((64, 32), np.float32)
    safetensors_file.write(tmp_path / "model.safetensors", tensors, metadata)
    (tmp_path / "config.json").write_text((FIXTURES / "bert" / "config.json").read_text())
    grown = models.resize_vocabulary(models.load(tmp_path), 66)
    models.save(tmp_path / "grown", grown)
    saved, _ = safetensors_file.read(tmp_path / "grown" / "model.safetensors")
    assert saved["embeddings.word_embeddings.weight"].shape == (66, 32)
    assert saved["cls.predictions.bias"].tolist() == [1] * 64 + [0] * 2
    assert saved["cls.predictions.decoder.weight"].shape == (66, 32)
    out = grown.apply(grown.params, np.array([[65, 64, 3]]), np.ones((1, 3), int))
    assert np.isfinite(out).all()


def test_stacked_layers_and_bfloat16_keep_their_dtype():
    model = models.resize_vocabulary(load("llama", scan=True, dtype="bfloat16"), 66)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert jax.eval_shape(model.apply, model.params, np.array([[65, 1]])).shape == (1, 2, 66)


@pytest.mark.parametrize(
    ("tokens", "more", "said"),
    [
        (0, {}, "tokens must be 1 or more, got 0"),
        (66, {"embedding": np.ones((3, 32))}, r"shape \(3, 32\), but 2 new rows of width 32"),
        (66, {"embedding": "zeros"}, "must be 'mean' or values, got 'zeros'"),
        (66, {"head": np.ones((2, 32))}, "no separate head"),
    ],
)
def test_what_does_not_fit_is_refused(tokens, more, said):
    with pytest.raises(ConfigError, match=said):
        models.resize_vocabulary(load("qwen2"), tokens, **more)


def test_it_is_done_before_adapters():
    model = load("qwen2")
    config = lora.LoraConfig(rank=2, targets=["embedding/embedding"])
    params = lora.init(jax.random.key(0), model.params, config, model.apply, IDS)
    with pytest.raises(StructureError, match="embedding/embedding: is a LoraWeight, but"):
        models.resize_vocabulary(dataclasses.replace(model, params=params), 70)
    with pytest.raises(ConfigError, match="no output head that is tied"):
        models.untie_head(load("llama"))


@pytest.mark.parametrize("untie", [False, True], ids=["tied", "untied"])
def test_a_trained_vocabulary_comes_back_from_pefts_file(untie, tmp_path):
    """The file has the embedding and the head in full; the plain base grows from it."""
    base = load("qwen2")
    model = models.resize_vocabulary(base, 70)
    model = models.untie_head(model) if untie else model
    train = ["embedding/embedding", *(["head/kernel"] if untie else [])]
    config = lora.LoraConfig(rank=2, targets=["query"], train=train)
    ids = IDS + 6
    params = lora.init(jax.random.key(0), model.params, config, model.apply, ids)
    _, adapters = lora.split(params)
    moved = jax.tree.map(lambda x: x + jnp.sin(jnp.arange(x.size)).reshape(x.shape), adapters)
    params = lora.join(model.params, moved)
    peft.save(tmp_path / "a", params, model.naming, config=config)
    tensors, _ = safetensors_file.read(tmp_path / "a" / "adapter_model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        assert tensors[f"base_model.model.{name}.weight"].shape == (70, 32)
    again = models.resize_for_adapter(base, tmp_path / "a")
    assert again.config == model.config
    loaded = peft.load(tmp_path / "a", again.params, again.naming)
    found = jax.jit(lora.lora(again.apply))(lora.join(again.params, loaded), ids)
    wanted = jax.jit(lora.lora(model.apply))(params, ids)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
