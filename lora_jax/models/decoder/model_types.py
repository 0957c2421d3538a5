"""What config.json of each `model_type` means: a table of the decoders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_jax.core.checks import is_size
from lora_jax.core.foreign import shown_value
from lora_jax.models.decoder import layer_choice
from lora_jax.models.decoder.experts import ExpertsConfig
from lora_jax.models.decoder.layer_choice import Settings


@dataclass(frozen=True)
class ModelType:
    """One `model_type`, whose fields of `DecoderConfig` have the names of config.json's keys.

    Attributes:
      defaults: what config.json leaves out.
      reads: keys beside those of `SHARED`.
      switches: fields of `DecoderConfig` that config.json does not say.
      derived: further fields, from settings in which defaults are filled in.
      layer_types: of each layer, or none where all layers are alike.
      partial: whether a part of each head may be rotated.
    """

    defaults: Settings = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    switches: Settings = field(default_factory=dict)
    derived: Callable[[Settings], dict[str, Any]] = lambda settings: {}
    layer_types: Callable[[Settings], Sequence[str]] = lambda settings: ()
    partial: bool = False


#: The keys of config.json that all types share, which are fields of `DecoderConfig`.
SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "hidden_act", "tie_word_embeddings"),
)
_BIAS, _BIASES = ("attention_bias",), ("attention_bias", "mlp_bias")


def _biased_output(settings: Settings) -> dict[str, Any]:
    return {"output_bias": settings.get("attention_bias") or False}


def _gemma(settings: Settings) -> dict[str, Any]:
    act = settings.get("hidden_activation") or settings.get("hidden_act")
    # files of Gemma 1 say "gelu" and mean its approximation
    return _of_gemmas(settings, "gelu_pytorch_tanh" if act == "gelu" else act)


def _of_gemmas(settings: Settings, act: Any) -> dict[str, Any]:
    """Return what all Gemmas share."""
    if settings.get("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention is not supported")
    width, scalar = settings["hidden_size"], settings.get("query_pre_attn_scalar")
    fields: dict[str, Any] = {
        "hidden_act": "gelu_pytorch_tanh" if act is None else act,
        "embedding_multiplier": width**0.5 if is_size(width) else width,
    }
    if scalar is not None:
        if not is_size(scalar):
            raise ValueError(
                "config.json: query_pre_attn_scalar must be a positive int, "
                f"got {shown_value(scalar)}"
            )
        fields["attention_scale"] = scalar**-0.5
    return fields | _biased_output(settings)


def _gemma3(settings: Settings) -> dict[str, Any]:
    # `hidden_act` and `attn_logit_softcapping` are without effect in transformers
    fields = _of_gemmas(settings, settings.get("hidden_activation"))
    return fields | {"final_cap": settings.get("final_logit_softcapping")}


def _gemma2(settings: Settings) -> dict[str, Any]:
    return _gemma3(settings) | {"attention_cap": settings.get("attn_logit_softcapping")}


def _granite(settings: Settings) -> dict[str, Any]:
    return _biased_output(settings) | {"attention_scale": settings["attention_multiplier"]}


def _experts(settings: Settings, count: str, width: str, **more: Any) -> dict[str, Any]:
    """Return the experts of all layers; `count` and `width` are keys of config.json."""
    number, chosen = settings.get(count), settings.get("num_experts_per_tok")
    return {"experts": ExpertsConfig(number, chosen, settings.get(width), **more)}  # type: ignore[arg-type]


def _qwen3_moe(settings: Settings) -> dict[str, Any]:
    layers, dense = layer_choice.count_of(settings), layer_choice.without_experts(settings)
    if len(dense) == layers:
        return _biased_output(settings)
    experts = _of_qwen_experts(settings, "moe_intermediate_size")
    return _biased_output(settings) | experts | {"dense_layers": dense}


def _of_qwen_experts(settings: Settings, width: str) -> dict[str, Any]:
    shares = "normalized" if settings.get("norm_topk_prob") else "all"
    # transformers 4 and 5 have two names for the number of experts
    count = "num_local_experts" if "num_local_experts" in settings else "num_experts"
    return _experts(settings, count, width, shares=shares)


def _olmoe(settings: Settings) -> dict[str, Any]:
    if settings.get("clip_qkv") is not None:
        raise ValueError("config.json: clip_qkv is not supported")
    return _biased_output(settings) | _of_qwen_experts(settings, "intermediate_size")


def _gpt_oss(settings: Settings) -> dict[str, Any]:
    experts = _experts(
        *(settings, "num_local_experts", "intermediate_size"),
        shares="chosen",
        bias=True,
        fused=True,
        alpha=settings["swiglu_alpha"],
        limit=settings["swiglu_limit"],
    )
    return _biased_output(settings) | experts


_MISTRAL = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
_GEMMA = {
    "head_dim": 256,
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA_2 = {
    **_GEMMA,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA_3 = {
    **_GEMMA,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
#: `model_type` in config.json -> what is known of it.
MODEL_TYPES: dict[str, ModelType] = {
    "llama": ModelType(reads=_BIASES, derived=_biased_output),
    "mistral": ModelType(_MISTRAL, layer_types=layer_choice.of_mistral),
    "ministral": ModelType(_MISTRAL, layer_types=layer_choice.of_mistral),
    "seed_oss": ModelType(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
        },
        reads=_BIASES,
        derived=lambda settings: {"output_bias": settings.get("attention_out_bias") or False},
    ),
    "qwen2": ModelType(
        _QWEN,
        switches={"attention_bias": True},
        layer_types=layer_choice.of_qwen,
    ),
    "qwen3": ModelType(
        {**_QWEN, "head_dim": 128},
        reads=_BIAS,
        switches={"qk_norm": "head"},
        derived=_biased_output,
        layer_types=layer_choice.of_qwen,
    ),
    "gemma": ModelType(_GEMMA, reads=_BIAS, switches={"unit_offset": True}, derived=_gemma),
    "gemma2": ModelType(
        _GEMMA_2,
        reads=_BIAS,
        switches={"unit_offset": True, "norms": "both"},
        derived=_gemma2,
        layer_types=layer_choice.alternating,
    ),
    "gemma3_text": ModelType(
        _GEMMA_3,
        reads=_BIAS,
        switches={"unit_offset": True, "norms": "both", "qk_norm": "head"},
        derived=_gemma3,
        layer_types=layer_choice.alternating,
    ),
    "phi3": ModelType(
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        switches={"fused": True},
        layer_types=layer_choice.all_sliding,
        partial=True,
    ),
    "smollm3": ModelType(
        {
            "rope_theta": 2e6,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        reads=_BIASES,
        derived=lambda settings: {
            **_biased_output(settings),
            "unrotated_layers": layer_choice.unrotated_of_smollm3(settings),
        },
        layer_types=layer_choice.of_smollm3,
    ),
    "olmo2": ModelType(
        {"rms_norm_eps": 1e-5},
        reads=_BIAS,
        switches={"norms": "post", "qk_norm": "width"},
        derived=_biased_output,
    ),
    "olmo3": ModelType(
        {
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "rope_theta": 5e5,
            "rope_local_base_freq": 5e5,
        },
        reads=_BIAS,
        switches={"norms": "post", "qk_norm": "width"},
        derived=_biased_output,
        layer_types=layer_choice.alternating,
    ),
    "exaone4": ModelType(
        {
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        switches={"norms": "post", "qk_norm": "head"},
        derived=lambda settings: {"unrotated_layers": layer_choice.unrotated_of_exaone4(settings)},
        layer_types=layer_choice.of_exaone4,
    ),
    "granite": ModelType(
        {"attention_multiplier": 1.0},
        reads=(*_BIASES, "embedding_multiplier", "residual_multiplier", "logits_scaling"),
        derived=_granite,
    ),
    "mixtral": ModelType(
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        derived=lambda settings: _experts(
            settings, "num_local_experts", "intermediate_size", shares="normalized"
        ),
        layer_types=layer_choice.all_sliding,
    ),
    "qwen3_moe": ModelType(
        {
            **_QWEN,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        reads=_BIAS,
        switches={"qk_norm": "head"},
        derived=_qwen3_moe,
        layer_types=layer_choice.of_qwen3_moe,
    ),
    "olmoe": ModelType(
        {
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
        reads=_BIAS,
        switches={"qk_norm": "width"},
        derived=_olmoe,
    ),
    "gpt_oss": ModelType(
        {
            "head_dim": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "sliding_window": 128,
            "sliding_window_pattern": 2,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
        reads=_BIAS,
        switches={"sinks": True},
        derived=_gpt_oss,
        layer_types=layer_choice.alternating,
    ),
}
