"""GGUF files of the newer families, written by the package `gguf` 0.19 as llama.cpp converts them.

The names of tensors are those of `gguf.get_tensor_name_map`; what is added to norms, and the keys,
are those of convert_hf_to_gguf.py.
"""

import numpy as np
import pytest
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, RopeScalingType, get_tensor_name_map

import lora_jax
from lora_jax import models
from lora_jax.core.errors import ModelFileError
from lora_jax.models.decoder.config import DecoderConfig
from tests.models.decoder.test_gguf import permuted, stored
from tests.models.recorded import EXPERTS, load

ARCHITECTURES = {
    "qwen3": MODEL_ARCH.QWEN3,
    "gemma": MODEL_ARCH.GEMMA,
    "gemma2": MODEL_ARCH.GEMMA2,
    "gemma3_text": MODEL_ARCH.GEMMA3,
    "phi3": MODEL_ARCH.PHI3,
    "mixtral": MODEL_ARCH.LLAMA,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
    "gpt_oss": MODEL_ARCH.GPT_OSS,
}
DENSE = [name for name in ARCHITECTURES if name not in EXPERTS]
PATTERN = [True, True, False, True]  # gemma3_text's layers with a window


def write(path, name, change=lambda writer: None, tensors=None):
    """Write a fixture as a float32 GGUF file; `tensors` in place of the fixture's."""
    settings, own = stored(name)
    tensors = own if tensors is None else tensors
    arch = ARCHITECTURES[name]
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    if "head_dim" in settings:
        writer.add_key_length(settings["head_dim"])
        writer.add_value_length(settings["head_dim"])
    rope = settings["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if name in ("gemma2", "gemma3_text", "phi3", "gpt_oss"):
        writer.add_sliding_window(settings["sliding_window"])
    if name == "gemma2":
        writer.add_attn_logit_softcapping(settings["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(settings["final_logit_softcapping"])
    if name == "gemma3_text":
        writer.add_sliding_window_pattern(PATTERN)
        writer.add_rope_freq_base_swa(50.0)
    if name == "phi3":
        original = settings["original_max_position_embeddings"]
        scale = settings["max_position_embeddings"] / original
        writer.add_rope_dimension_count(4)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(np.sqrt(1 + np.log(scale) / np.log(original)))
        for kind in ("long", "short"):
            factors = np.asarray(rope[f"{kind}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{kind}.weight", factors)
    change(writer)
    names = get_tensor_name_map(arch, settings["num_hidden_layers"])
    for key, value in tensors.items():
        if name.startswith("gemma") and key.endswith("norm.weight"):
            value = value + np.float32(1)
        writer.add_tensor(names.get_name(key, (".weight", ".bias")), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", DENSE)
def test_the_same_model_as_in_safetensors(name, tmp_path):
    model = models.load(write(tmp_path / "model.gguf", name), scan=name == "gemma2")
    want = load(name, scan=name == "gemma2")
    settings = stored(name)[0]
    if "query_pre_attn_scalar" in settings:  # which llama.cpp does not store
        settings["query_pre_attn_scalar"] = settings["head_dim"]
    assert model.config == DecoderConfig.from_json(settings, scan=want.config.scan)
    flat = lambda params: dict(lora_jax.core.paths.flatten_with_paths(params)[0])
    got, want = flat(model.params), flat(want.params)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        rounded = name.startswith("gemma") and path.endswith("norm/scale")
        np.testing.assert_allclose(got[path], leaf, atol=1e-6 if rounded else 0, rtol=0)


def test_patterns_that_llama_cpp_takes_for_granted(tmp_path):
    """Files of Gemma 2 and 3 that are older than the keys have llama.cpp's own patterns."""
    path = write(tmp_path / "2.gguf", "gemma2")
    windows = [kind.window for kind in models.load(path).config.layer_kinds]
    assert windows == [4, None, 4, None]


def test_factors_without_their_length_are_refused(tmp_path):
    def drop(writer):
        for data in writer.kv_data:
            data.pop("phi3.rope.scaling.original_context_length", None)

    with pytest.raises(ModelFileError, match="original_context_length together"):
        models.load(write(tmp_path / "x.gguf", "phi3", drop))


def of_llama_cpp(name):
    """Stack and split the tensors of experts as convert_hf_to_gguf.py does."""
    settings, tensors = stored(name)
    heads = {"q_proj": settings["num_attention_heads"], "k_proj": settings["num_key_value_heads"]}
    found, experts = {}, {}
    for key, value in sorted(tensors.items()):
        layer, _, rest = key.partition(".mlp.experts.")
        if ".block_sparse_moe.experts." in key:
            layer, _, rest = key.partition(".block_sparse_moe.experts.")
        if rest.startswith("gate_up_proj"):
            both = value if rest.endswith("_bias") else value.swapaxes(1, 2)
            leaf = "bias" if rest.endswith("_bias") else "weight"
            found[f"{layer}.mlp.experts.gate_proj.{leaf}"] = both[:, ::2].copy()
            found[f"{layer}.mlp.experts.up_proj.{leaf}"] = both[:, 1::2].copy()
        elif rest.startswith("down_proj"):
            is_bias = rest.endswith("_bias")
            whole = value if is_bias else value.swapaxes(1, 2).copy()
            found[f"{layer}.mlp.experts.down_proj.{'bias' if is_bias else 'weight'}"] = whole
        elif rest:
            expert, module, leaf = rest.split(".")
            new = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(module, module)
            experts.setdefault(f"{layer}.mlp.experts.{new}.{leaf}", {})[int(expert)] = value
        elif key.endswith("sinks"):
            found[f"{key}.weight"] = value
        else:
            turned = [
                permuted(value, n) for x, n in heads.items() if x in key and name == "mixtral"
            ]
            found[key] = turned[0] if turned else value
    return found | {key: np.stack([x[e] for e in sorted(x)]) for key, x in experts.items()}


def count_experts(name):
    settings = stored(name)[0]

    def change(writer):
        writer.add_expert_count(settings["num_local_experts"])
        writer.add_expert_used_count(settings["num_experts_per_tok"])
        if name != "mixtral":
            width = settings.get("moe_intermediate_size", settings["intermediate_size"])
            writer.add_expert_feed_forward_length(width)

    return change


@pytest.mark.parametrize("name", [x for x in EXPERTS if x in ARCHITECTURES])
def test_the_same_experts_as_in_safetensors(name, tmp_path):
    scan = name == "gpt_oss"
    path = write(tmp_path / "model.gguf", name, count_experts(name), of_llama_cpp(name))
    model, want = models.load(path, scan=scan), load(name, scan=scan)
    settings = {**want.settings, **({"swiglu_limit": 7.0} if name == "gpt_oss" else {})}
    assert model.config == DecoderConfig.from_json(settings, scan=scan)
    flat = lambda params: dict(lora_jax.core.paths.flatten_with_paths(params)[0])
    got, want = flat(model.params), flat(want.params)
    assert got.keys() == want.keys()
    for key, leaf in want.items():
        np.testing.assert_array_equal(got[key], leaf, key)
    models.save(tmp_path / "again", model)
    saved = models.load(tmp_path / "again", scan=scan)
    for key, leaf in flat(saved.params).items():
        np.testing.assert_array_equal(leaf, want[key], key)


def test_numbers_of_experts_that_are_missing(tmp_path):
    change = lambda writer: writer.add_expert_count(4)
    path = write(tmp_path / "model.gguf", "mixtral", change, of_llama_cpp("mixtral"))
    with pytest.raises(ModelFileError, match="lacks expert_used_count"):
        models.load(path)
