"""The models of speech: one row per `model_type` of config.json."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.models.speech import naming
from lora_jax.models.speech.config import WhisperConfig
from lora_jax.models.speech.whisper import Whisper
from lora_jax.models.weights.family import Family, Options


def _whisper(settings: Mapping[str, Any], options: Options) -> nn.Module:
    config = WhisperConfig.from_json(settings, scan=options.scan, remat=options.remat)
    return Whisper(config)


def _inputs(module: Any) -> dict[str, Any]:
    c = module.config
    return {
        "ids": jax.ShapeDtypeStruct((1, 1), jnp.int32),
        "features": jax.ShapeDtypeStruct((1, c.frames, c.num_mel_bins), jnp.float32),
    }


#: `model_type` in config.json -> what is known of it.
SPEECH: dict[str, Family] = {
    "whisper": Family(
        kind="speech",
        stem="Whisper",
        model_class="ForConditionalGeneration",
        module=_whisper,
        naming=naming.naming,
        embedding=("decoder", "embedding", "embedding"),
        sizes=(
            *("vocab_size", "d_model", "num_mel_bins", "encoder_ffn_dim", "decoder_ffn_dim"),
            *("encoder_attention_heads", "decoder_attention_heads"),
            *("max_source_positions", "max_target_positions"),
        ),
        dropped=(r"proj_out\.weight",),
        inputs=_inputs,
        layers=("encoder_layers", "decoder_layers"),
    ),
}
