"""What config.json of each `model_type` means: a table of the decoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_jax.core.checks import is_integer, is_size
from lora_jax.core.foreign import shown_value
from lora_jax.models.decoder.experts import ExpertsConfig

FULL, SLIDING = "full_attention", "sliding_attention"
Settings = Mapping[str, Any]


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


def _all_sliding(settings: Settings) -> list[str]:
    return [SLIDING] * _layers(settings)


def _of_mistral(settings: Settings) -> list[str]:
    return _given_types(settings) or _all_sliding(settings)


def _of_exaone4(settings: Settings) -> list[str]:
    if settings.get("sliding_window") is None:
        return [FULL] * _layers(settings)
    return _alternating(settings)


def _of_qwen3_moe(settings: Settings) -> list[str]:
    return [SLIDING if settings.get("use_sliding_window") else FULL] * _layers(settings)


def _of_qwen(settings: Settings) -> list[str]:
    if not settings.get("use_sliding_window"):
        return [FULL] * _layers(settings)
    if given := _given_types(settings):
        return given
    first, layers = settings.get("max_window_layers", 28), _layers(settings)
    if not isinstance(first, int) or isinstance(first, bool):
        raise ValueError("config.json: max_window_layers and num_hidden_layers must be ints")
    return [SLIDING if i >= first else FULL for i in range(layers)]


def _alternating(settings: Settings) -> list[str]:
    """Return every n-th layer as one that sees all tokens."""
    if given := _given_types(settings):
        return given
    every = settings["sliding_window_pattern"]
    if not is_size(every):
        raise ValueError(
            f"config.json: sliding_window_pattern must be a positive int, got {shown_value(every)}"
        )
    return [SLIDING if (i + 1) % every else FULL for i in range(_layers(settings))]


def _of_smollm3(settings: Settings) -> list[str]:
    if not settings.get("use_sliding_window"):
        return [FULL] * _layers(settings)
    without = _unrotated(settings)
    return _given_types(settings) or [
        SLIDING if i in without else FULL for i in range(_layers(settings))
    ]


def _unrotated(settings: Settings) -> tuple[int, ...]:
    """Return the layers without rotation."""
    layers = _layers(settings)
    given, every = settings.get("no_rope_layers"), settings["no_rope_layer_interval"]
    if given is None and is_size(every):
        given = [int((i + 1) % every != 0) for i in range(layers)]
    if not isinstance(given, list) or len(given) < layers or not set(map(str, given)) <= {"0", "1"}:
        raise ValueError(
            "config.json: no_rope_layers must be a list with 1 for each layer that rotates and 0 "
            "for each that does not"
        )
    return tuple(i for i in range(layers) if not given[i])


def _given_types(settings: Settings) -> list[str]:
    types = settings.get("layer_types")
    if not isinstance(types, list) or not types:
        return []
    if unknown := [kind for kind in types if kind not in (FULL, SLIDING)]:
        raise ValueError(
            f"config.json: layer_types has {shown_value(unknown[0])}, which is not one of "
            f"{[FULL, SLIDING]}"
        )
    return types


def _layers(settings: Settings) -> int:
    layers = settings["num_hidden_layers"]
    if not is_size(layers):
        raise ValueError(
            "config.json: max_window_layers and num_hidden_layers must be ints, got "
            f"{shown_value(layers)}"
        )
    return min(layers, 10**5)  # a larger number exceeds any file, and is refused there


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


def _exaone4(settings: Settings) -> dict[str, Any]:
    """Return which layers rotate: those with a window, where there are some."""
    if settings.get("sliding_window") is None:
        return {}
    types = _of_exaone4(settings)
    return {"unrotated_layers": tuple(i for i, name in enumerate(types) if name == FULL)}


def _granite(settings: Settings) -> dict[str, Any]:
    return _biased_output(settings) | {"attention_scale": settings["attention_multiplier"]}


def _experts(settings: Settings, count: str, width: str, **more: Any) -> dict[str, Any]:
    """Return the experts of all layers; `count` and `width` are keys of config.json."""
    number, chosen = settings.get(count), settings.get("num_experts_per_tok")
    return {"experts": ExpertsConfig(number, chosen, settings.get(width), **more)}  # type: ignore[arg-type]


def _qwen3_moe(settings: Settings) -> dict[str, Any]:
    layers, dense = _layers(settings), _dense(settings)
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


def _dense(settings: Settings) -> tuple[int, ...]:
    """Return the numbers of Qwen3-MoE's layers without experts."""
    only, step = settings.get("mlp_only_layers") or [], settings["decoder_sparse_step"]
    if not isinstance(only, list) or not all(map(is_integer, only)):
        raise ValueError(
            f"config.json: mlp_only_layers must be a list of ints, got {shown_value(only)}"
        )
    if not is_size(step):
        raise ValueError(
            f"config.json: decoder_sparse_step must be a positive int, got {shown_value(step)}"
        )
    return tuple(i for i in range(_layers(settings)) if i in {*only} or (i + 1) % step)


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
    "mistral": ModelType(_MISTRAL, layer_types=_of_mistral),
    "ministral": ModelType(_MISTRAL, layer_types=_of_mistral),
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
        layer_types=_of_qwen,
    ),
    "qwen3": ModelType(
        {**_QWEN, "head_dim": 128},
        reads=_BIAS,
        switches={"qk_norm": "head"},
        derived=_biased_output,
        layer_types=_of_qwen,
    ),
    "gemma": ModelType(_GEMMA, reads=_BIAS, switches={"unit_offset": True}, derived=_gemma),
    "gemma2": ModelType(
        _GEMMA_2,
        reads=_BIAS,
        switches={"unit_offset": True, "norms": "both"},
        derived=_gemma2,
        layer_types=_alternating,
    ),
    "gemma3_text": ModelType(
        _GEMMA_3,
        reads=_BIAS,
        switches={"unit_offset": True, "norms": "both", "qk_norm": "head"},
        derived=_gemma3,
        layer_types=_alternating,
    ),
    "phi3": ModelType(
        {
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        switches={"fused": True},
        layer_types=_all_sliding,
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
            "unrotated_layers": _unrotated(settings),
        },
        layer_types=_of_smollm3,
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
        layer_types=_alternating,
    ),
    "exaone4": ModelType(
        {
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        switches={"norms": "post", "qk_norm": "head"},
        derived=_exaone4,
        layer_types=_of_exaone4,
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
        layer_types=_all_sliding,
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
        layer_types=_of_qwen3_moe,
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
        layer_types=_alternating,
    ),
}
