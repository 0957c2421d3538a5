"""Sizes of Whisper, under the names in config.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lora_jax.core.checks import is_size
from lora_jax.core.foreign import shown_value
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.remat import policy_name


@dataclass(frozen=True)
class WhisperConfig:
    """Configuration of Whisper; the defaults are transformers' own.

    Attributes:
      scan: stack the layers' parameters, of the encoder and of the decoder, and run them in one
        `lax.scan` each.
      remat: which activations each layer recomputes in the backward pass, as in `DecoderConfig`.

    Raises `ValueError` at construction for a size below one, for a width that a number of heads
    does not divide, for an activation that is not in `ACTIVATIONS`, or for an unknown `remat`.
    """

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    max_source_positions: int = 1500
    max_target_positions: int = 448
    activation_function: str = "gelu"
    scan: bool = False
    remat: bool | str = False

    def __post_init__(self) -> None:
        policy_name(self.remat)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int and not is_size(value):
                raise ValueError(
                    f"WhisperConfig.{f.name} must be a positive int, got {shown_value(value)}"
                )
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(
                    f"WhisperConfig: d_model {self.d_model} is not a multiple of {name} "
                    f"{getattr(self, name)}"
                )
        name = self.activation_function
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise ValueError(
                f"WhisperConfig.activation_function {shown_value(name)} is not one of "
                f"{sorted(ACTIVATIONS)}"
            )

    @property
    def frames(self) -> int:
        """The number of frames of a recording: two for each state of the encoder."""
        return 2 * self.max_source_positions

    @property
    def longest(self) -> int:
        """The number of tokens of the longest text."""
        return self.max_target_positions

    @property
    def num_attention_heads(self) -> int:
        """The number of groups of heads that encoder and decoder can both be cut into."""
        return math.gcd(self.encoder_attention_heads, self.decoder_attention_heads)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any], **extra_fields: Any) -> "WhisperConfig":
        """Read a parsed `config.json`; `scan` and `remat` are not in the file.

        Raises:
          ValueError: `WhisperConfig` refuses a value, the head is not tied to the embedding, or the
            model is only a part of Whisper with another head.
        """
        classes = settings.get("architectures")
        for name in classes if isinstance(classes, list) else ():
            if str(name).endswith(("AudioClassification", "CausalLM")):
                raise ValueError(
                    f"architectures: {shown_value(name)} is not supported, only "
                    "WhisperForConditionalGeneration"
                )
        if settings.get("tie_word_embeddings") is False:
            raise ValueError("tie_word_embeddings: false is not supported for whisper models")
        names = {f.name for f in fields(cls)} - {"scan", "remat"}
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        return cls(**given, **extra_fields)
