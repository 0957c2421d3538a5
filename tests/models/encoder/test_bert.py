"""BERT against an independent float64 implementation in NumPy, and its loader's strictness."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import models
from lora_jax.models.encoder.bert import Bert, BertConfig, mean_pool

TINY = BertConfig(
    vocab_size=23,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=16,
    layer_norm_eps=1e-3,
)
IDS = np.array([[2, 5, 7, 11, 3, 0, 0], [2, 1, 3, 0, 0, 0, 0]])
MASK = (IDS > 0).astype(np.int32)


def shapes(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in a Hugging Face file, written out by hand."""
    w, f = config.hidden_size, config.intermediate_size
    found = {
        "embeddings.word_embeddings.weight": (config.vocab_size, w),
        "embeddings.position_embeddings.weight": (config.max_position_embeddings, w),
        "embeddings.token_type_embeddings.weight": (config.type_vocab_size, w),
        "embeddings.LayerNorm.weight": (w,),
        "embeddings.LayerNorm.bias": (w,),
    }
    for i in range(config.num_hidden_layers):
        for name, shape in {
            "attention.self.query": (w, w),
            "attention.self.key": (w, w),
            "attention.self.value": (w, w),
            "attention.output.dense": (w, w),
            "attention.output.LayerNorm": (w,),
            "intermediate.dense": (f, w),
            "output.dense": (w, f),
            "output.LayerNorm": (w,),
        }.items():
            found[f"encoder.layer.{i}.{name}.weight"] = shape
            found[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    return found


def random_tensors(config: BertConfig = TINY) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape, scale=0.5).astype(np.float32)
        for name, shape in shapes(config).items()
    }


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, random_tensors())
    return tmp_path


def write(directory, tensors, config=TINY):
    settings = {"model_type": "bert", **dataclasses.asdict(config)}
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "model.safetensors")


def oracle(tensors, ids, types=None) -> np.ndarray:
    """Compute the hidden states of one unpadded text, `[length, width]`, in float64."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    heads, size = TINY.num_attention_heads, TINY.hidden_size // TINY.num_attention_heads

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + TINY.layer_norm_eps)
        return scaled * t[f"{name}.weight"] + t[f"{name}.bias"]

    def dense(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][ids]
    x = x + t["embeddings.position_embeddings.weight"][: len(ids)]
    kinds = np.zeros_like(ids) if types is None else types
    x = norm(x + t["embeddings.token_type_embeddings.weight"][kinds], "embeddings.LayerNorm")
    for i in range(TINY.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        q, k, v = (dense(x, f"{layer}.attention.self.{n}") for n in ("query", "key", "value"))
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        y = dense(np.concatenate(mixed, axis=-1), f"{layer}.attention.output.dense")
        x = norm(x + y, f"{layer}.attention.output.LayerNorm")
        y = dense(x, f"{layer}.intermediate.dense")
        y = 0.5 * y * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = norm(x + dense(y, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def encode(directory, *inputs) -> jax.Array:
    model = models.load(directory)
    return jax.jit(model.apply)(model.params, *map(jnp.asarray, inputs))


def test_matches_the_oracle(directory, strict):
    types = np.arange(IDS.size).reshape(IDS.shape) % 2
    hidden = encode(directory, IDS, MASK, types)
    assert hidden.dtype == jnp.float32
    np.testing.assert_array_equal(hidden, encode(directory, IDS, MASK.astype(bool), types))
    for row in range(2):
        length = MASK[row].sum()
        expected = oracle(random_tensors(), IDS[row, :length], types[row, :length])
        np.testing.assert_allclose(hidden[row, :length], expected, atol=5e-6, rtol=0)


def test_packed_texts_do_not_see_each_other(directory):
    texts = [np.array([2, 5, 7, 3]), np.array([2, 9, 3]), np.array([2, 4, 8, 15, 3])]
    packed = np.concatenate([*texts, [0, 0]])[None]
    segments = np.repeat([1, 2, 3, 0], [4, 3, 5, 2])[None]
    pooled = mean_pool(encode(directory, packed, segments), segments, count=4)
    expected = [oracle(random_tensors(), text).mean(axis=0) for text in texts]
    np.testing.assert_allclose(pooled[0], [*expected, np.zeros(12)], atol=5e-6, rtol=0)


def test_mean_pool_by_hand():
    hidden = jnp.array([[[3.0, 0.0], [3.0, 8.0], [0.0, 2.0], [9.0, 9.0]]])
    segments = jnp.array([[1, 1, 2, 0]])
    np.testing.assert_array_equal(mean_pool(hidden, segments), [[[3.0, 4.0]]])
    unit = mean_pool(hidden, segments, count=3, normalize=True)
    np.testing.assert_allclose(unit, [[[0.6, 0.8], [0.0, 1.0], [0.0, 0.0]]], rtol=1e-6)


def test_an_absent_segment_has_a_gradient_of_zero():
    hidden = jnp.ones((1, 3, 2))
    gradient = jax.grad(lambda h: mean_pool(h, jnp.zeros((1, 3), int), normalize=True).sum())
    np.testing.assert_array_equal(gradient(hidden), jnp.zeros_like(hidden))


def test_names_with_a_prefix_and_what_the_encoder_does_not_use(tmp_path):
    tensors = {f"bert.{name}": tensor for name, tensor in random_tensors().items()}
    extra = {
        "bert.embeddings.position_ids": np.arange(16)[None],
        "bert.pooler.dense.weight": np.zeros((12, 12), np.float32),
        "bert.pooler.dense.bias": np.zeros(12, np.float32),
    }
    write(tmp_path, tensors | extra)
    loaded = models.load(tmp_path)
    params = loaded.params
    expected = random_tensors()["encoder.layer.1.output.dense.weight"].T
    np.testing.assert_array_equal(params["layer_1"]["output"]["kernel"], expected)
    assert len(jax.tree.leaves(params)) == len(tensors)
    assert loaded.rest.keys() == extra.keys()


def test_the_names_of_the_first_published_files(tmp_path):
    renamed = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in random_tensors().items()
    }
    write(tmp_path, renamed | {"cls.predictions.bias": np.zeros(23, np.float32)})
    params = models.load(tmp_path).params
    expected = random_tensors()["encoder.layer.1.output.LayerNorm.bias"]
    np.testing.assert_array_equal(params["layer_1"]["output_norm"]["bias"], expected)


def test_all_differences_are_listed_at_once(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.bias"]
    del tensors["embeddings.LayerNorm.weight"]
    tensors["regressor.weight"] = np.zeros((2, 12), np.float32)
    tensors["encoder.layer.1.intermediate.dense.weight"] = np.zeros((12, 20), np.float32)
    write(directory, tensors)
    with pytest.raises(ValueError) as error:
        models.load(directory)
    assert str(error.value).splitlines()[1:] == [
        "  embeddings.LayerNorm.weight: missing, (12,) for embeddings/norm/scale",
        "  encoder.layer.0.output.dense.bias: missing, (12,) for layer_0/output/bias",
        "  encoder.layer.1.intermediate.dense.weight: has shape (12, 20), but "
        "layer_1/intermediate/kernel needs (20, 12)",
        "  regressor.weight: unexpected",
    ]


def test_a_file_cut_short(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        models.load(directory)


def test_a_missing_file(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        models.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 13}, "hidden_size 13 is not a multiple of num_attention_heads 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive int"),
        ({"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\] is not one of"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be a positive number"),
        ({"hidden_act": "prelu"}, "hidden_act 'prelu' is not one of"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"vocab_size": None}, "vocab_size must be a positive int, got None"),
    ],
)
def test_configurations_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_json(dataclasses.asdict(TINY) | change)


def test_a_size_left_out():
    settings = dataclasses.asdict(TINY)
    del settings["intermediate_size"]
    with pytest.raises(ValueError, match=r"missing 1 required .* 'intermediate_size'"):
        BertConfig.from_json(settings)


def test_too_long_a_text():
    ids = jax.ShapeDtypeStruct((1, 17), jnp.int32)
    with pytest.raises(ValueError, match="length 17 is above max_position_embeddings 16"):
        jax.eval_shape(Bert(TINY).init, jax.random.key(0), ids, ids)
