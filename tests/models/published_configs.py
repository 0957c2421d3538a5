"""config.json of published encoders, models of images and Whisper, as their authors wrote them."""

from typing import Any


def _bert(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    drops = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
    rest = {"num_attention_heads": 12, "hidden_act": "gelu", "initializer_range": 0.02}
    return {**sizes, **drops, **rest, **more}


def _modernbert(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": ["ModernBertForMaskedLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 50281,
        "classifier_activation": "gelu",
        "classifier_bias": False,
        "classifier_dropout": 0.0,
        "classifier_pooling": "mean",
        "cls_token_id": 50281,
        "decoder_bias": True,
        "deterministic_flash_attn": False,
        "embedding_dropout": 0.0,
        "eos_token_id": 50282,
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0,
        "gradient_checkpointing": False,
        "hidden_activation": "gelu",
        "hidden_size": width,
        "initializer_cutoff_factor": 2.0,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-05,
        "local_attention": 128,
        "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "mlp_dropout": 0.0,
        "model_type": "modernbert",
        "norm_bias": False,
        "norm_eps": 1e-05,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 50283,
        "position_embedding_type": "absolute",
        "sep_token_id": 50282,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": 50368,
    }


def _whisper(width: int, heads: int, layers: tuple[int, int], **more: Any) -> dict[str, Any]:
    parts = {"encoder": layers[0], "decoder": layers[1]}
    sizes: dict[str, Any] = {f"{part}_layers": count for part, count in parts.items()}
    sizes |= {f"{part}_attention_heads": heads for part in parts}
    sizes |= {f"{part}_ffn_dim": 4 * width for part in parts}
    return {
        "activation_dropout": 0.0,
        "activation_function": "gelu",
        "architectures": ["WhisperForConditionalGeneration"],
        "begin_suppress_tokens": [220, 50257],
        "bos_token_id": 50257,
        "d_model": width,
        "decoder_layerdrop": 0.0,
        "decoder_start_token_id": 50258,
        "eos_token_id": 50257,
        "is_encoder_decoder": True,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "model_type": "whisper",
        "num_mel_bins": 80,
        "pad_token_id": 50257,
        "scale_embedding": False,
        "use_cache": True,
        "vocab_size": 51865,
        **sizes,
        **more,
    }


_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
}
_CLIP_TEXT = {
    **{"hidden_act": "quick_gelu", "hidden_size": 768, "intermediate_size": 3072},
    **{"max_position_embeddings": 77, "num_attention_heads": 12, "num_hidden_layers": 12},
    **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 49408},
    **{"layer_norm_eps": 1e-05, "projection_dim": 768, "model_type": "clip_text_model"},
}
_CLIP_VISION = {
    **{"hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 224, "patch_size": 14},
    **{"intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24},
    **{"layer_norm_eps": 1e-05, "projection_dim": 768, "model_type": "clip_vision_model"},
}

#: Name -> its config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "bert-base-uncased": _bert(
        architectures=["BertForMaskedLM"],
        layer_norm_eps=1e-12,
        max_position_embeddings=512,
        model_type="bert",
        pad_token_id=0,
        position_embedding_type="absolute",
        type_vocab_size=2,
        use_cache=True,
        vocab_size=30522,
    ),
    "roberta-base": _bert(
        architectures=["RobertaForMaskedLM"],
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=1e-05,
        max_position_embeddings=514,
        model_type="roberta",
        pad_token_id=1,
        type_vocab_size=1,
        vocab_size=50265,
    ),
    "xlm-roberta-base": _bert(
        architectures=["XLMRobertaForMaskedLM"],
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=1e-05,
        max_position_embeddings=514,
        model_type="xlm-roberta",
        output_past=True,
        pad_token_id=1,
        position_embedding_type="absolute",
        type_vocab_size=1,
        vocab_size=250002,
    ),
    "ModernBERT-base": _modernbert(768, 1152, 22, 12),
    "ModernBERT-large": _modernbert(1024, 2624, 28, 16),
    "vit-base-patch16-224": _bert(
        architectures=["ViTForImageClassification"],
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        id2label={str(i): f"class {i}" for i in range(1000)},
        image_size=224,
        layer_norm_eps=1e-12,
        model_type="vit",
        num_channels=3,
        patch_size=16,
        qkv_bias=True,
    ),
    "siglip-base-patch16-224": {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model"},
        "vision_config": {"model_type": "siglip_vision_model"},
    },
    "siglip-so400m-patch14-384": {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {**_SO400M, "model_type": "siglip_text_model"},
        "vision_config": {
            **_SO400M,
            "image_size": 384,
            "model_type": "siglip_vision_model",
            "patch_size": 14,
        },
    },
    "clip-vit-large-patch14": {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 768,
        "text_config": _CLIP_TEXT,
        "text_config_dict": {
            **{"hidden_size": 768, "intermediate_size": 3072, "projection_dim": 768},
            **{"num_attention_heads": 12, "num_hidden_layers": 12, "eos_token_id": 2},
        },
        "torch_dtype": "float32",
        "vision_config": _CLIP_VISION,
        "vision_config_dict": {
            **{"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
            **{"num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768},
        },
    },
    "whisper-tiny": _whisper(384, 6, (4, 4), forced_decoder_ids=[[1, 50259], [2, 50359]]),
    "whisper-large-v3": _whisper(1280, 20, (32, 32), num_mel_bins=128, vocab_size=51866),
    "whisper-large-v3-turbo": _whisper(1280, 20, (32, 4), num_mel_bins=128, vocab_size=51866),
}
