"""Random fields of config.json, of those that transformers reads for a `model_type`."""

from collections.abc import Callable
from typing import Any

from tests.stress.model_configs.draw import Draw

FULL, SLIDING = "full_attention", "sliding_attention"
_ROPES = ("linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
Fields = dict[str, Any]


def _sizes(draw: Draw) -> Fields:
    heads = draw.one_of([1, 2, 4, 6])
    return {
        "vocab_size": draw.one_of([61, 64]),
        "hidden_size": heads * draw.one_of([4, 6, 8]) if draw.rarely() else 24,
        "intermediate_size": draw.one_of([20, 36]),
        "num_hidden_layers": draw.one_of([1, 2, 2, 3, 4]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.one_of([x for x in (1, 2, 3, 6) if heads % x == 0]),
        "max_position_embeddings": draw.one_of([32, 48]),
        "rms_norm_eps": draw.seldom(1e-6, 1e-5, 1e-12, 0.1),
        "hidden_act": draw.activation("silu"),
        "tie_word_embeddings": draw.seldom(False, True),
        "initializer_range": 0.25,
        "bos_token_id": draw.seldom(None, 1),
        "eos_token_id": draw.seldom(None, 2, [2, 3]),
        "pad_token_id": draw.seldom(None, 0),
    }


def _head_dim(draw: Draw, fields: Fields) -> None:
    """Draw a size of a head other than the width divided by the number of heads."""
    if draw.random.random() < 0.6 or (fields["hidden_size"] // fields["num_attention_heads"]) % 2:
        fields["head_dim"] = draw.one_of([4, 6, 8, 12])


def head_size(fields: Fields) -> int:
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def rope(draw: Draw, fields: Fields, kinds: tuple[str, ...] = _ROPES, part: float = 1.0) -> Fields:
    """Draw `rope_parameters`."""
    found: Fields = {"rope_type": "default", "rope_theta": draw.one_of([20.0, 1e3, 1e4, 5e5])}
    if part != 1.0:
        found["partial_rotary_factor"] = part
    if not kinds or draw.random.random() < 0.3:
        return found
    kind = found["rope_type"] = draw.one_of(kinds)
    original = {"original_max_position_embeddings": draw.one_of([8, 12])}
    if kind in ("linear", "dynamic"):
        found["factor"] = draw.one_of([1.0, 2.0, 3.5, 8])
    if kind == "proportional":
        found["partial_rotary_factor"] = draw.one_of([0.5, 0.75, 1.0])
        found |= {"factor": 2.0} if draw.rarely() else {}
    if kind == "llama3":
        found |= {"factor": draw.one_of([2.0, 8.0]), "high_freq_factor": draw.one_of([4.0, 2.5])}
        found |= {"low_freq_factor": draw.one_of([1.0, 0.5])} | original
    if kind == "yarn":
        found["factor"] = draw.one_of([1.0, 2.0, 4.0])
        found |= original if not draw.rarely() else {}
        found |= {"beta_fast": draw.one_of([32.0, 4, 8.0])} if draw.rarely() else {}
        found |= {"beta_slow": draw.one_of([1.0, 0.25])} if draw.rarely() else {}
        found |= {"truncate": draw.one_of([True, False])} if draw.rarely() else {}
        found |= {"mscale": draw.one_of([1.0, 0.7])} if draw.rarely() else {}
        found |= {"mscale_all_dim": draw.one_of([1.0, 0.4, 0.0])} if draw.rarely() else {}
        found |= {"attention_factor": draw.one_of([0.8, 1.25])} if draw.rarely() else {}
    if kind == "longrope":
        pairs = int(head_size(fields) * part) // 2
        numbers = lambda low, high: [round(draw.random.uniform(low, high), 3) for _ in range(pairs)]
        found |= {"short_factor": numbers(1, 1.5), "long_factor": numbers(1, 6)}
        found |= {"factor": draw.one_of([1.0, 4.0])} if draw.rarely() else {}
        found |= {"attention_factor": draw.one_of([0.8, 1.25])} if draw.rarely() else {}
        if draw.random.random() < 0.5:
            found |= original
        else:
            fields |= original
    return found


def _types(draw: Draw, fields: Fields) -> list[str]:
    return [draw.one_of([FULL, SLIDING]) for _ in range(fields["num_hidden_layers"])]


def _window(draw: Draw) -> int:
    return draw.one_of([1, 2, 5, 9, 64])


def _of_llama(draw: Draw) -> Fields:
    fields = _sizes(draw)
    _head_dim(draw, fields)
    fields |= {"attention_bias": draw.seldom(False, True), "mlp_bias": draw.seldom(False, True)}
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_mistral(draw: Draw) -> Fields:
    fields = _sizes(draw)
    _head_dim(draw, fields)
    fields["sliding_window"] = draw.seldom(None, _window(draw))
    return fields | {"rope_parameters": rope(draw, fields)}


def _windows_of_qwen(draw: Draw, fields: Fields) -> None:
    fields["sliding_window"] = draw.seldom(_window(draw), None)
    fields["use_sliding_window"] = draw.one_of([True, False])
    if fields["use_sliding_window"]:
        fields["max_window_layers"] = draw.one_of([0, 1, 2, 28])
        if fields["sliding_window"] and draw.rarely():
            fields["layer_types"] = _types(draw, fields)


def _of_qwen2(draw: Draw) -> Fields:
    fields = _sizes(draw)
    if (fields["hidden_size"] // fields["num_attention_heads"]) % 2 or draw.rarely():
        fields["head_dim"] = 8  # an attribute that its class does not have, but its modules read
    _windows_of_qwen(draw, fields)
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_qwen3(draw: Draw) -> Fields:
    fields = _sizes(draw) | {"head_dim": draw.one_of([4, 6, 8])}
    fields["attention_bias"] = draw.seldom(False, True)
    _windows_of_qwen(draw, fields)
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_gemma(draw: Draw) -> Fields:
    fields = _sizes(draw) | {"head_dim": draw.one_of([4, 6, 8])}
    fields["hidden_act"] = draw.activation(draw.seldom("gelu_pytorch_tanh", "gelu", "silu"))
    fields["tie_word_embeddings"] = draw.seldom(True, False)
    fields["attention_bias"] = draw.seldom(False, True)
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_gemma2(draw: Draw) -> Fields:
    fields = _of_gemma(draw)
    fields["hidden_activation"] = fields.pop("hidden_act")
    if draw.rarely():
        fields["hidden_act"] = "relu"  # without effect
    fields["query_pre_attn_scalar"] = draw.one_of([4, 6, 16, 256])
    fields["attn_logit_softcapping"] = draw.seldom(None, 0.5, 50.0)
    fields["final_logit_softcapping"] = draw.seldom(None, 1.5, 30.0)
    fields["sliding_window"] = _window(draw)
    if draw.rarely():
        fields["layer_types"] = _types(draw, fields)
    return fields


def _of_gemma3_text(draw: Draw) -> Fields:
    fields = _of_gemma2(draw)
    if "layer_types" not in fields and draw.random.random() < 0.5:
        fields["sliding_window_pattern"] = draw.one_of([1, 2, 3])
    kinds = tuple(x for x in _ROPES if x != "longrope")
    fields["rope_parameters"] = {
        FULL: rope(draw, fields, kinds),
        SLIDING: rope(draw, fields, kinds if draw.rarely() else ()),
    }
    fields["use_bidirectional_attention"] = draw.random.random() < 0.05
    return fields


def _of_gemma3(draw: Draw) -> Fields:
    text = _of_gemma3_text(draw) | {"vocab_size": 64}
    tied = text["tie_word_embeddings"]
    images = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    images |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_use_head": False}
    tokens = {"image_token_index": 63, "boi_token_index": 61, "eoi_token_index": 62}
    return {
        "text_config": text,
        "vision_config": images,
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": tied,
        **tokens,
    }


def _of_phi3(draw: Draw) -> Fields:
    fields = _sizes(draw)
    heads = fields["num_attention_heads"]
    part, size = draw.seldom(1.0, 0.5, 0.75), draw.one_of([8, 16])
    fields["pad_token_id"] = draw.seldom(0, None)
    fields |= {"hidden_size": heads * size, "partial_rotary_factor": part}
    fields["sliding_window"] = draw.seldom(None, _window(draw))
    scaled = rope(draw, fields, ("longrope",), part)
    if scaled["rope_type"] == "longrope" and draw.rarely():
        scaled["rope_type"] = draw.one_of(["su", "yarn"])
    if part != 1.0 and draw.rarely():
        scaled.pop("partial_rotary_factor", None)
    return fields | {"rope_parameters": scaled}


def _of_smollm3(draw: Draw) -> Fields:
    fields = _sizes(draw)
    layers = fields["num_hidden_layers"]
    if (fields["hidden_size"] // fields["num_attention_heads"]) % 2 or draw.rarely():
        fields["head_dim"] = 8
    fields |= {"attention_bias": draw.seldom(False, True), "mlp_bias": draw.seldom(False, True)}
    if draw.random.random() < 0.5:
        fields["no_rope_layers"] = [draw.one_of([0, 1]) for _ in range(layers)]
    else:
        fields["no_rope_layer_interval"] = draw.one_of([1, 2, 3, 4])
    fields["sliding_window"] = draw.seldom(None, _window(draw))
    fields["use_sliding_window"] = draw.one_of([True, False])
    if fields["sliding_window"] and draw.random.random() < 0.4:
        fields["layer_types"] = _types(draw, fields)
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_olmo2(draw: Draw) -> Fields:
    fields = _sizes(draw)
    if (fields["hidden_size"] // fields["num_attention_heads"]) % 2 or draw.rarely():
        fields["head_dim"] = 8
    fields["attention_bias"] = draw.seldom(False, True)
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_granite(draw: Draw) -> Fields:
    fields = _of_llama(draw)
    fields["embedding_multiplier"] = draw.seldom(1.0, 12, 3.5)
    fields["logits_scaling"] = draw.seldom(1.0, 8, 2.5)
    fields["residual_multiplier"] = draw.seldom(1.0, 0.22)
    fields["attention_multiplier"] = draw.seldom(0.35, 1, 0.015625)
    return fields


def _of_mixtral(draw: Draw) -> Fields:
    fields = _of_mistral(draw)
    fields["num_local_experts"] = draw.one_of([1, 2, 5])
    fields["num_experts_per_tok"] = draw.random.randint(1, fields["num_local_experts"])
    return fields


def _of_qwen3_moe(draw: Draw) -> Fields:
    fields = _sizes(draw) | {"head_dim": draw.one_of([4, 6, 8])}
    fields["attention_bias"] = draw.seldom(False, True)
    fields["sliding_window"] = draw.seldom(_window(draw), None)
    fields["use_sliding_window"] = draw.seldom(False, True)
    fields["num_experts"] = draw.one_of([1, 2, 5])
    fields["num_experts_per_tok"] = draw.random.randint(1, fields["num_experts"])
    fields["moe_intermediate_size"] = draw.one_of([8, 12])
    fields["norm_topk_prob"] = draw.one_of([True, False])
    fields["decoder_sparse_step"] = draw.seldom(1, 2, 3)
    layers = range(fields["num_hidden_layers"])
    fields["mlp_only_layers"] = [i for i in layers if draw.rarely()] if draw.rarely() else []
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_gpt_oss(draw: Draw) -> Fields:
    fields = _sizes(draw) | {"head_dim": draw.one_of([4, 6, 8])}
    fields["attention_bias"] = draw.seldom(True, False)
    fields["num_local_experts"] = draw.one_of([1, 2, 5])
    fields["num_experts_per_tok"] = draw.random.randint(1, fields["num_local_experts"])
    fields["sliding_window"] = _window(draw)
    fields |= {"swiglu_alpha": draw.seldom(1.702, 1.0), "swiglu_limit": draw.seldom(0.5, 7.0)}
    if draw.rarely():
        fields["layer_types"] = _types(draw, fields)
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_ministral(draw: Draw) -> Fields:
    fields = _of_mistral(draw)
    # its class computes with both, whatever it says of null
    fields |= {"head_dim": draw.one_of([4, 6, 8]), "sliding_window": _window(draw)}
    if draw.random.random() < 0.6:
        fields["layer_types"] = _types(draw, fields)
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_seed_oss(draw: Draw) -> Fields:
    fields = _of_llama(draw) | {"head_dim": draw.one_of([4, 6, 8])}
    fields |= {"attention_bias": draw.seldom(True, False)}
    fields |= {"attention_out_bias": draw.seldom(False, True)}
    return fields | {"rope_parameters": rope(draw, fields)}


def _of_olmo3(draw: Draw) -> Fields:
    fields = _of_olmo2(draw) | {"sliding_window": _window(draw)}
    if draw.rarely():
        fields["layer_types"] = _types(draw, fields)
    kinds = tuple(x for x in _ROPES if x != "longrope")
    local = {"rope_type": "default", "rope_theta": 5e5}
    fields["rope_parameters"] = {FULL: rope(draw, fields, kinds), SLIDING: local}
    return fields


def _of_exaone4(draw: Draw) -> Fields:
    fields = _of_olmo2(draw) | {"sliding_window": draw.seldom(_window(draw), None)}
    del fields["attention_bias"]
    if fields["sliding_window"] is None:
        fields["layer_types"] = [FULL] * fields["num_hidden_layers"]
    elif draw.rarely():
        fields["layer_types"] = _types(draw, fields)
    else:
        fields["sliding_window_pattern"] = draw.one_of([1, 2, 3])
    return fields


def _of_olmoe(draw: Draw) -> Fields:
    fields = _sizes(draw) | {"num_experts": draw.one_of([1, 2, 5])}
    size = draw.one_of([4, 6, 8])
    fields["hidden_size"] = size * fields["num_attention_heads"]
    fields["num_experts_per_tok"] = draw.random.randint(1, fields["num_experts"])
    fields["attention_bias"] = draw.seldom(False, True)
    fields["norm_topk_prob"] = draw.one_of([True, False])
    fields["clip_qkv"] = 8.0 if draw.random.random() < 0.05 else None
    return fields | {"rope_parameters": rope(draw, fields)}


#: `model_type` -> the fields of one random model.
FAMILIES: dict[str, Callable[[Draw], Fields]] = {
    "llama": _of_llama,
    "mistral": _of_mistral,
    "ministral": _of_ministral,
    "seed_oss": _of_seed_oss,
    "qwen2": _of_qwen2,
    "qwen3": _of_qwen3,
    "gemma": _of_gemma,
    "gemma2": _of_gemma2,
    "gemma3_text": _of_gemma3_text,
    "gemma3": _of_gemma3,
    "phi3": _of_phi3,
    "smollm3": _of_smollm3,
    "olmo2": _of_olmo2,
    "olmo3": _of_olmo3,
    "exaone4": _of_exaone4,
    "granite": _of_granite,
    "mixtral": _of_mixtral,
    "qwen3_moe": _of_qwen3_moe,
    "olmoe": _of_olmoe,
    "gpt_oss": _of_gpt_oss,
}
