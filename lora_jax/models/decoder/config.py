"""Configuration of the decoders: one class for all families of `model_types.MODEL_TYPES`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

from lora_jax.core.checks import is_integer, is_size, is_within
from lora_jax.core.foreign import shown_value
from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.decoder.experts import ExpertsConfig
from lora_jax.models.decoder.layer_choice import FULL, SLIDING
from lora_jax.models.decoder.model_types import MODEL_TYPES, SHARED
from lora_jax.models.remat import policy_name
from lora_jax.models.rope import Rope

PARAM_DTYPES = ("float32", "bfloat16", "float16")
EPSILONS = (1e-30, 1.0)  # of a norm: the smallest is above zero in float32 as well
#: Where a layer has norms: before attention and feed-forward network, before and after, or after.
NORMS = ("pre", "both", "post")
#: What the norms of queries and keys take the mean of: a head, or all heads together.
QK_NORMS = ("none", "head", "width")
_FACTORS = (1e-6, 1e6)  # the smallest and the largest of a multiplier or a cap


@dataclass(frozen=True)
class LayerKind:
    """In what the layers of a model may differ.

    Attributes:
      window: how many tokens a token sees, itself included; None for all before it.
      rope: how queries and keys are rotated, None for not at all.
      dense: whether it has one feed-forward network although other layers have experts.
    """

    window: int | None
    rope: Rope | None
    dense: bool = False


@dataclass(frozen=True)
class DecoderConfig:
    """Configuration of a decoder, under the names in `config.json` where it has one.

    Attributes:
      num_key_value_heads: keys and values are shared by groups of query heads; by default each
        query head has its own.
      head_dim: size of a head, by default `hidden_size / num_attention_heads`.
      attention_bias, output_bias: whether the q, k and v projections, and the output projection,
        have a bias.
      sliding_window: how many tokens a token sees, itself included; None for all before it.
      layer_types: "sliding_attention" or "full_attention" for each layer; empty where all have the
        window.
      local_rope: the rotation in layers with a window, `rope` by default.
      unrotated_layers: the numbers of layers without a rotation.
      norms: where a layer has norms, one of `NORMS`.
      qk_norm: which norms queries and keys have, one of `QK_NORMS`.
      unit_offset: whether norms multiply by one plus their parameter.
      fused: whether q, k and v are one parameter, and gate and up another one.
      attention_scale: of the scores of attention, by default 1 / √head_dim.
      attention_cap, final_cap: the scores of attention and the logits x become cap · tanh(x / cap);
        None for no cap.
      embedding_multiplier, residual_multiplier: of the embedding, in its dtype, and of what each
        attention and feed-forward network adds.
      logits_scaling: logits are divided by it.
      experts: of each layer, in the place of one feed-forward network.
      dense_layers: the numbers of layers that have the network nevertheless; not with `scan`.
      sinks: whether each head has one more score, of a key whose value is zero (gpt-oss).
      scan: stack the layers' parameters and run the layers in one `lax.scan`.
      remat: which activations each layer recomputes in the backward pass instead of storing them:
        none (False), full (True), or sums (all but the results of products).
      dtype: dtype of the computation; norms, rotations and the softmax are always in float32.
      param_dtype: dtype of the parameters that `init` creates.

    Raises `ValueError` at construction for a size below one, head counts that do not divide, an
    odd number of rotated numbers, an activation that is not in `ACTIVATIONS`, an unknown `remat`, a
    dtype that is not in `PARAM_DTYPES`, or types of another number of layers,
    or layers without experts in a scan.
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
    layer_types: tuple[str, ...] = ()
    local_rope: Rope | None = None
    unrotated_layers: tuple[int, ...] = ()
    norms: str = "pre"
    qk_norm: str = "none"
    unit_offset: bool = False
    fused: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    final_cap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    experts: ExpertsConfig | None = None
    dense_layers: tuple[int, ...] = ()
    sinks: bool = False

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
        try:
            policy_name(self.remat)
        except ValueError as error:
            raise ValueError(f"DecoderConfig: {error}") from None
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                raise ValueError(
                    f"DecoderConfig.{name} {shown_value(value)} is not one of {list(allowed)}"
                )
        self._check_layers()

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
            limits = EPSILONS if f.name == "rms_norm_eps" else _FACTORS
            is_number = f.type is float or (f.type == float | None and value is not None)
            if is_number and not is_within(value, *limits):
                raise ValueError(
                    f"DecoderConfig.{f.name} must be a positive number up to {limits[1]:g}, "
                    f"got {shown_value(value)}"
                )
        window = self.sliding_window
        if window is not None and not is_size(window):
            raise ValueError(
                "DecoderConfig.sliding_window must be a positive int or None, "
                f"got {shown_value(window)}"
            )

    def _check_layers(self) -> None:
        for rope in (self.rope, *([] if self.local_rope is None else [self.local_rope])):
            rotated = rope.rotated(self.head_dim)
            if rotated % 2 or not rotated:
                part = "" if rotated == self.head_dim else f", of which {rotated} are rotated"
                raise ValueError(
                    f"DecoderConfig: rotations need an even head_dim, got {self.head_dim}{part}"
                )
            rope.frequencies(self.head_dim)  # refuses factors of another number of pairs
        count, types = self.num_hidden_layers, self.layer_types
        if types and len(types) != count:
            raise ValueError(
                f"DecoderConfig.layer_types has {len(types)} entries for {count} layers"
            )
        if unknown := [x for x in types if x not in (FULL, SLIDING)]:
            raise ValueError(
                f"DecoderConfig.layer_types: {shown_value(unknown[0])} is not one of "
                f"{[FULL, SLIDING]}"
            )
        if SLIDING in types and self.sliding_window is None:
            raise ValueError(
                f"DecoderConfig.layer_types has {SLIDING}, so sliding_window must be a positive int"
            )
        for name in ("unrotated_layers", "dense_layers"):
            if wrong := [i for i in getattr(self, name) if not (is_integer(i) and 0 <= i < count)]:
                raise ValueError(
                    f"DecoderConfig.{name}: {shown_value(wrong[0])} is not one of {count} layers"
                )
        if self.dense_layers and self.scan:
            raise ValueError(
                "layers without experts have other parameters than layers with, so they cannot be "
                "stacked: load them with scan=False (mlp_only_layers and decoder_sparse_step in "
                "config.json say which are without)"
            )

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        default = FULL if self.sliding_window is None else SLIDING
        found = []
        for i, name in enumerate(self.layer_types or (default,) * self.num_hidden_layers):
            is_local = name == SLIDING
            rope = self.local_rope if is_local and self.local_rope else self.rope
            window = self.sliding_window if is_local else None
            turned = None if i in self.unrotated_layers else rope
            found.append(LayerKind(window, turned, dense=i in self.dense_layers))
        return tuple(found)

    @classmethod
    def from_json(cls, settings: Mapping[str, Any], **extra_fields: Any) -> "DecoderConfig":
        """Read a parsed `config.json` of one of `MODEL_TYPES`.

        Args:
          settings: the parsed file.
          **extra_fields: `scan`, `remat`, `dtype` and `param_dtype`, which the file does not
            decide.

        Raises:
          ValueError: the `model_type` is unknown, sizes are missing (all are listed), `Rope` or
            `DecoderConfig` refuses a value, or the weights are quantized.
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
        row = MODEL_TYPES[model_type]
        if settings.get(_SCALING) is None:  # null means the default too
            settings = {k: x for k, x in settings.items() if k != _SCALING}
        settings = {**row.defaults, **settings}
        names = (*SHARED, *row.reads)
        given = {name: settings[name] for name in names if settings.get(name) is not None}
        given |= {**row.switches, **row.derived(settings)}
        given |= _layers(settings, tuple(row.layer_types(settings)))
        config = cls(**given, **_ropes(settings), **extra_fields)
        any_part = row.partial or config.rope.kind == "proportional"
        if config.rope.partial != 1.0 and not any_part:
            raise ValueError(
                f"partial_rotary_factor {shown_value(config.rope.partial)} is not supported for "
                f"model_type {model_type}"
            )
        return config


_SCALING = "rope_scaling"
_CHOICES = {
    "hidden_act": tuple(ACTIVATIONS),
    "norms": NORMS,
    "qk_norm": QK_NORMS,
    "dtype": PARAM_DTYPES,
    "param_dtype": PARAM_DTYPES,
}


def _layers(settings: Mapping[str, Any], types: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields about windows: no types where all layers are alike."""
    window = settings.get("sliding_window")
    if window is None or SLIDING not in types:
        return {"sliding_window": None}
    if types == (SLIDING,) * settings["num_hidden_layers"]:
        return {"sliding_window": window}
    return {"sliding_window": window, "layer_types": types}


def _ropes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields about rotations: layers with a window may have another one."""
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    by_type = isinstance(given, Mapping) and (FULL in given or SLIDING in given)
    theta = settings.get("rope_local_base_freq")
    if not by_type and theta is None:
        return {"rope": _rope(settings, given)}
    # transformers reads this key beside one rotation, and within each of two
    settings = {**settings, "original_max_position_embeddings": None}
    both = given if by_type else {FULL: given}
    local = settings if theta is None else {**settings, "rope_theta": theta}
    return {
        "rope": _rope(settings, both.get(FULL)),
        "local_rope": _rope(local, both.get(SLIDING)),
    }


def _rope(settings: Mapping[str, Any], given: Any) -> Rope:
    """Return a rotation; Phi-3's older files have other names for `longrope`."""
    is_phi3 = settings.get("model_type") == "phi3"
    if is_phi3 and isinstance(given, Mapping):
        kind = given.get("rope_type", given.get("type"))
        given = {**given, "rope_type": "longrope" if kind in ("su", "yarn") else kind}
    return Rope.from_json({**settings, "rope_parameters": given, "rope_scaling": None})
