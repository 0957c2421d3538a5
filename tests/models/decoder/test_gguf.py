"""Models in GGUF files: tiny ones of transformers, written here as llama.cpp converts them."""

import json
import pathlib

import jax
import numpy as np
import pytest
from gguf import GGUFWriter

from lora_jax import models
from lora_jax.core.errors import ModelFileError
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import to_tree
from lora_jax.models.decoder import gguf as decoder_gguf
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.decoder.naming import LLAMA
from tests.stress.damaged_files import gguf_bytes, published

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures"


def stored(name):
    """Return a fixture's config.json and its tensors."""
    settings = json.loads((FIXTURES / name / "config.json").read_text())
    tensors = {}
    for path in sorted((FIXTURES / name).glob("*.safetensors")):
        tensors |= safetensors_file.read(path)[0]
    return settings, tensors


def permuted(rows, heads):
    """Interleave the halves of each head, as llama.cpp's LlamaModel.permute."""
    rest = rows.shape[1:]
    return rows.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(-1, *rest)


def llama_cpp_name(name):
    for theirs, its in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.", "attn_"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
    ]:
        name = name.replace(theirs, its)
    return name


def write_gguf(path, name, kind="llama", extra=(), changes=None, divisors=None):
    """Write a fixture as a float32 GGUF file."""
    settings, tensors = stored(name)
    heads = {"q_proj": settings["num_attention_heads"], "k_proj": settings["num_key_value_heads"]}
    rope = settings["rope_parameters"]
    fields = {
        "embedding_length": settings["hidden_size"],
        "feed_forward_length": settings["intermediate_size"],
        "block_count": settings["num_hidden_layers"],
        "attention.head_count": settings["num_attention_heads"],
        "attention.head_count_kv": settings["num_key_value_heads"],
        "attention.key_length": settings.get("head_dim"),
        "context_length": settings["max_position_embeddings"],
        "attention.layer_norm_rms_epsilon": settings["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
        "rope.scaling.type": "linear" if rope["rope_type"] == "linear" else None,
        "rope.scaling.factor": rope["factor"] if rope["rope_type"] == "linear" else None,
    } | (changes or {})
    writer = GGUFWriter(path, kind)
    adds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in fields.items():
        if value is not None:
            adds[type(value)](f"{kind}.{key}", value)
    for key, value in tensors.items():
        turned = [permuted(value, heads[x]) for x in heads if x in key and kind == "llama"]
        writer.add_tensor(llama_cpp_name(key), np.ascontiguousarray((turned or [value])[0]))
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(divisors, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(settings):
    """Return the reciprocal frequencies of Hugging Face's `_compute_llama3_parameters`."""
    rope, size = settings["rope_parameters"], settings["head_dim"]
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    smooth = (original / waves - 1) / 3
    middle = 1 / ((1 - smooth) / factor + smooth)
    return np.where(waves > original, factor, np.where(waves < original / 4, 1, middle))


@pytest.fixture(params=["llama", "llama_tied", "qwen2"], scope="module")
def written(request, tmp_path_factory):
    name = request.param
    settings, _ = stored(name)
    path = tmp_path_factory.mktemp(name) / "model.gguf"
    divisors = llama3_divisors(settings) if name == "llama" else None
    return name, write_gguf(path, name, "qwen2" if name == "qwen2" else "llama", divisors=divisors)


@pytest.mark.parametrize("scan", [False, True])
def test_the_same_model_as_in_safetensors(written, scan):
    name, path = written
    settings, tensors = decoder_gguf.read_model(path)
    theirs, expected = stored(name)
    config = DecoderConfig.from_json(settings, scan=scan)
    assert config == DecoderConfig.from_json(theirs, scan=scan)
    model, ids = Decoder(config), jax.ShapeDtypeStruct((1, 1), "int32")
    like = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    want = to_tree(LLAMA, expected, like)
    in_file, ignore = decoder_gguf.file_naming(LLAMA, settings), decoder_gguf.IGNORED
    got = to_tree(in_file, tensors, like, ignore=ignore)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_settings_are_those_of_config_json(tmp_path):
    settings, _ = decoder_gguf.read_model(write_gguf(tmp_path / "x.gguf", "qwen2", "qwen2"))
    theirs, _ = stored("qwen2")
    assert settings == {key: 10000.0 if key == "rope_theta" else theirs[key] for key in settings}
    assert settings["rms_norm_eps"] == 1e-6  # not its float32 rounding


@pytest.mark.parametrize(
    ("kind", "changes", "divisors", "message"),
    [
        ("t5", {}, None, "architecture 't5' is not supported, only llama, qwen2"),
        ("llama", {"block_count": None}, None, r"lacks llama\.block_count"),
        ("qwen2", {"expert_count": 8}, None, "mixtures of experts"),
        ("llama", {"rope.dimension_count": 4}, None, "only a part of the head size 8"),
        ("llama", {"rope.scaling.type": "su"}, None, "rotary embeddings of type 'su'"),
        ("llama", {}, [1, 2, 3, 9], "does not contain the divisors of Llama 3.1"),
        ("llama", {}, [1, 8], "does not contain the divisors of Llama 3.1"),
    ],
)
def test_models_that_cannot_be_read(tmp_path, kind, changes, divisors, message):
    path = write_gguf(tmp_path / "x.gguf", "llama", kind, changes=changes, divisors=divisors)
    with pytest.raises(ModelFileError, match=rf"x\.gguf: .*{message}"):
        decoder_gguf.read_model(path)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("llama.attention.head_count", 0, "an integer from 1"),
        ("llama.attention.head_count_kv", [1, 2], "an integer from 1"),
        ("llama.rope.dimension_count", [4, 4], "an integer from 1"),
        ("llama.block_count", 0.5, "an integer from 1"),
        ("llama.block_count", True, "an integer from 1"),
        ("llama.embedding_length", "8", "an integer from 1"),
        ("llama.embedding_length", 2**63, "an integer from 1"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "a number from 1e-30 to 1"),
        ("llama.rope.freq_base", 0.0, "a number from 1 to 1e15"),
        ("llama.rope.scaling.type", [1.0], "a string"),
        ("llama.rope.scaling.factor", float("inf"), "a number from 0.01 to 1e6"),
        ("llama.expert_count", [], "an integer from 0"),
        ("general.architecture", 3, "a string"),
        ("tokenizer.ggml.tokens", 1.5, "an array of strings"),
        ("tokenizer.ggml.tokens", [1, 2], "an array of strings"),
        ("tokenizer.ggml.token_type", 3, "an array of integers"),
        ("tokenizer.ggml.token_type", ["a"], "an array of integers"),
        ("tokenizer.ggml.merges", False, "an array of strings"),
        ("tokenizer.ggml.pre", ["smollm"], "a string"),
        ("tokenizer.ggml.bos_token_id", [0], "an integer of 32 bits"),
        ("tokenizer.ggml.bos_token_id", -2, "an integer of 32 bits"),
        ("tokenizer.ggml.add_bos_token", [True, False], "true or false"),
        ("tokenizer.chat_template", 5, "a string"),
    ],
)
def test_metadata_of_another_type_or_range(tmp_path, key, value, wanted):
    """Every key is checked before anything uses it, and the message names key and value."""
    parts = gguf_bytes.decode(published.gguf("model").files["model.gguf"])
    parts.metadata = [item for item in parts.metadata if item[0] != key]
    parts.metadata.append((key, *gguf_bytes.typed(value)))
    (tmp_path / "x.gguf").write_bytes(gguf_bytes.encode(parts))
    with pytest.raises(ModelFileError, match=rf"x\.gguf: .*{key} must be {wanted}.*, got "):
        models.load(tmp_path / "x.gguf")
