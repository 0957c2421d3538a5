"""Configuration of the decoders: Llama, Mistral, Qwen2 and SmolLM2."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from lora_jax.core.checks import is_size, is_within
from lora_jax.core.foreign import shown_value
from lora_jax.models.remat import policy_name
from lora_jax.models.rope import Rope

#: Defaults per model type, for what its config.json leaves out.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "max_position_embeddings": 131072},
    "qwen2": {"attention_bias": True, "max_position_embeddings": 32768},
}
PARAM_DTYPES = ("float32", "bfloat16", "float16")
EPSILONS = (1e-30, 1.0)  # of a norm: the smallest is above zero in float32 as well


@dataclass(frozen=True)
class DecoderConfig:
    """Configuration of a decoder, under the names in `config.json`.

    Attributes:
      num_key_value_heads: keys and values are shared by groups of query heads; by default each
        query head has its own.
      head_dim: size of a head, by default `hidden_size / num_attention_heads`.
      attention_bias, output_bias: whether the q, k and v projections, and the output projection,
        have a bias.
      sliding_window: how many tokens a token sees, itself included; None for all before it.
      scan: stack the layers' parameters and run the layers in one `lax.scan`.
      remat: which activations each layer recomputes in the backward pass instead of storing them:
        none (False), full (True), or sums (all but the results of products).
      dtype: dtype of the computation; norms, rotations and the softmax are always in float32.
      param_dtype: dtype of the parameters that `init` creates.

    Raises `ValueError` at construction for a size below one, head counts that do not divide, an
    odd head size, an activation other than `silu`, an unknown `remat`, or a dtype that is not in
    `PARAM_DTYPES`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Rope = field(default_factory=Rope)
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    scan: bool = False
    remat: bool | str = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    REQUIRED: ClassVar = (
        *("vocab_size", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads"),
    )

    def __post_init__(self) -> None:
        fill = partial(object.__setattr__, self)
        if self.num_key_value_heads == 0:
            fill("num_key_value_heads", self.num_attention_heads)
        if self.head_dim == 0:
            self._check_types(but="head_dim")
            fill("head_dim", self.hidden_size // self.num_attention_heads)
        self._check_types()
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"DecoderConfig: num_attention_heads {self.num_attention_heads} is not a multiple "
                f"of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"DecoderConfig: rotations need an even head_dim, got {self.head_dim}")
        try:
            policy_name(self.remat)
        except ValueError as error:
            raise ValueError(f"DecoderConfig: {error}") from None
        for name, allowed in (
            ("hidden_act", ("silu",)),
            ("dtype", PARAM_DTYPES),
            ("param_dtype", PARAM_DTYPES),
        ):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(
                    f"DecoderConfig.{name} {shown_value(value)} is not one of {list(allowed)}"
                )

    def _check_types(self, but: str = "") -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == but:
                continue
            if f.type is int and not is_size(value):
                raise ValueError(
                    f"DecoderConfig.{f.name} must be a positive int, got {shown_value(value)}"
                )
            if f.type is bool and not isinstance(value, bool):
                raise ValueError(
                    f"DecoderConfig.{f.name} must be true or false, got {shown_value(value)}"
                )
        if not is_within(self.rms_norm_eps, *EPSILONS):
            raise ValueError(
                f"DecoderConfig.rms_norm_eps must be a positive number up to 1, "
                f"got {shown_value(self.rms_norm_eps)}"
            )
        window = self.sliding_window
        if window is not None and not is_size(window):
            raise ValueError(
                "DecoderConfig.sliding_window must be a positive int or None, "
                f"got {shown_value(window)}"
            )

    @classmethod
    def from_json(cls, settings: Mapping[str, Any], **extra_fields: Any) -> "DecoderConfig":
        """Read a parsed `config.json` of Llama, Mistral or Qwen2.

        Args:
          settings: the parsed file.
          **extra_fields: `scan`, `remat`, `dtype` and `param_dtype`, which the file does not
            decide.

        Raises:
          ValueError: the `model_type` is unknown, sizes are missing (all are listed), `Rope` or
            `DecoderConfig` refuses a value, only some layers have a sliding window, or the weights
            are quantized.
        """
        model_type = settings.get("model_type", "llama")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise ValueError(
                f"model_type {shown_value(model_type)} is not one of {sorted(MODEL_TYPES)}"
            )
        if settings.get("quantization_config"):
            raise ValueError(
                "config.json has a quantization_config: quantized weights are not supported"
            )
        if missing := [name for name in cls.REQUIRED if settings.get(name) is None]:
            raise ValueError(f"config.json has no {', '.join(missing)}")
        settings = MODEL_TYPES[model_type] | dict(settings)
        # `rope` and ours are not keys of the file, and its `dtype` is that of the weights
        own = {"rope", "scan", "remat", "dtype", "param_dtype", "output_bias", "sliding_window"}
        known = {f.name for f in fields(cls)} - own
        given = {name: settings[name] for name in known if settings.get(name) is not None}
        return cls(
            **given,
            rope=Rope.from_json(settings),
            output_bias=model_type == "llama" and given.get("attention_bias", False),
            sliding_window=_window(settings, model_type),
            **extra_fields,
        )


def _window(settings: Mapping[str, Any], model_type: str) -> int | None:
    """Return the sliding window that all layers share, or None."""
    window = settings.get("sliding_window")
    if model_type == "llama" or window is None:
        return None
    types = settings.get("layer_types")
    if model_type == "qwen2" and not settings.get("use_sliding_window"):
        kinds = {"full_attention"}
    elif isinstance(types, list) and types:
        if not all(isinstance(kind, str) for kind in types):
            raise ValueError("config.json: layer_types must be a list of names")
        kinds = set(types)
    else:
        first, layers = settings.get("max_window_layers", 28), settings["num_hidden_layers"]
        if not isinstance(first, int) or not isinstance(layers, int):
            raise ValueError("config.json: max_window_layers and num_hidden_layers must be ints")
        first = first if model_type == "qwen2" else 0
        kinds = {"full_attention"} if first > 0 else set()
        kinds |= {"sliding_attention"} if first < layers else set()
    if len(kinds) > 1:
        raise ValueError(
            "config.json: a sliding window in only some of the layers is not supported"
        )
    return window if "sliding_attention" in kinds else None
