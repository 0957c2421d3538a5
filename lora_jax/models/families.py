"""The table of all models here: one row per `model_type` of config.json."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown_value
from lora_jax.files.naming import Naming
from lora_jax.models.decoder.config import DecoderConfig
from lora_jax.models.decoder.model_types import MODEL_TYPES
from lora_jax.models.decoder.module import Decoder
from lora_jax.models.decoder.naming import (
    GPT_OSS,
    LLAMA,
    MIXTRAL_FILES,
    OF_GEMMA3,
    POST_NORMS,
    QWEN_MOE_FILES,
    of_experts,
    of_gemma3_files,
)
from lora_jax.models.encoder.families import ENCODERS
from lora_jax.models.speech.families import SPEECH
from lora_jax.models.vision.families import VISION
from lora_jax.models.weights.family import ClassifierHead, Family, Options

_OF_ALL = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")


def _decoder(settings: Mapping[str, Any], options: Options) -> Decoder:
    config = DecoderConfig.from_json(
        settings,
        scan=options.scan,
        remat=options.remat,
        dtype=options.dtype,
        param_dtype=options.dtype,
    )
    return Decoder(config)


def _text_of_gemma3(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json with images says of the part that reads text.

    Raises:
      ValueError: it says nothing of it.
    """
    text = settings.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config must be an object, got {shown_value(text)}")
    left_out = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4}
    # transformers caps the logits of a Gemma 3 of text only
    fixed = {"model_type": "gemma3_text", "final_logit_softcapping": None}
    return {**left_out, **text, **fixed, _TIED: is_tied(settings)}


def _gemma3(settings: Mapping[str, Any], options: Options) -> Decoder:
    return _decoder(_text_of_gemma3(settings), options)


def _fixed(naming: Naming, names: Collection[str] = ()) -> Naming:
    return naming  # whatever a file has


def _of_experts(files: Naming) -> dict[str, Any]:
    """Return the namings of models whose files have a module per expert."""
    return {"naming": partial(of_experts, files), "in_files": partial(_fixed, files)}


#: A row of the decoders but for `stem`.
_llama = partial(
    Family,
    kind="decoder",
    model_class="ForCausalLM",
    module=_decoder,
    naming=partial(_fixed, LLAMA),
    embedding=("embedding", "embedding"),
    sizes=(*_OF_ALL, "num_key_value_heads", "head_dim", "num_attention_heads * head_dim"),
    classifier=ClassifierHead("last", "score"),
    kept=(r"score\..*",),
    dropped=(r".*\.rotary_emb\.inv_freq",),
)

#: `model_type` in config.json -> what is known of it.
FAMILIES: dict[str, Family] = {
    **ENCODERS,
    **VISION,
    **SPEECH,
    "llama": _llama(stem="Llama"),
    "mistral": _llama(stem="Mistral"),
    "ministral": _llama(stem="Ministral"),
    "seed_oss": _llama(stem="SeedOss"),
    "qwen2": _llama(stem="Qwen2"),
    "qwen3": _llama(stem="Qwen3"),
    "gemma": _llama(stem="Gemma"),
    "gemma2": _llama(stem="Gemma2", naming=partial(_fixed, POST_NORMS)),
    "gemma3_text": _llama(stem="Gemma3", naming=partial(_fixed, POST_NORMS)),
    "gemma3": _llama(
        stem="Gemma3",
        model_class="ForConditionalGeneration",
        module=_gemma3,
        naming=partial(_fixed, OF_GEMMA3),
        in_files=of_gemma3_files,
        sizes=tuple(f"text_config.{x}" for x in (*_OF_ALL, "num_key_value_heads", "head_dim")),
        layers=("text_config.num_hidden_layers",),
        classifier=None,
        kept=(r"(model\.)?(vision_tower|multi_modal_projector)\..*",),
    ),
    "phi3": _llama(stem="Phi3"),
    "smollm3": _llama(stem="SmolLM3"),
    "olmo2": _llama(stem="Olmo2", naming=partial(_fixed, POST_NORMS)),
    "olmo3": _llama(stem="Olmo3", naming=partial(_fixed, POST_NORMS)),
    "exaone4": _llama(stem="Exaone4", naming=partial(_fixed, POST_NORMS)),
    "granite": _llama(stem="Granite"),
    "mixtral": _llama(stem="Mixtral", **_of_experts(MIXTRAL_FILES)),
    "qwen3_moe": _llama(stem="Qwen3Moe", **_of_experts(QWEN_MOE_FILES)),
    "olmoe": _llama(stem="Olmoe", **_of_experts(QWEN_MOE_FILES)),
    "gpt_oss": _llama(stem="GptOss", naming=partial(_fixed, GPT_OSS)),
}
#: The regex of the copy of a tied head, which follows from the rest too.
TIED_HEAD = r"(language_model\.)?lm_head\.weight"
_TIED = "tie_word_embeddings"


def is_tied(settings: Mapping[str, Any]) -> bool:
    """Return whether the head of a decoder is its embedding, by its parsed config.json."""
    model_type, text = settings.get("model_type"), settings.get("text_config")
    row = MODEL_TYPES.get("gemma3_text" if model_type == "gemma3" else str(model_type))
    default = False if row is None else row.defaults.get(_TIED, False)
    given = [x.get(_TIED) for x in (settings, text) if isinstance(x, Mapping)]
    return bool(next((x for x in given if x is not None), default))


def family_of(settings: Mapping[str, Any]) -> Family:
    """Return the row of a parsed config.json.

    Raises:
      ModelFileError: its `model_type` is unknown.
    """
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelFileError(
            f"model_type {shown_value(model_type)} is not one of {sorted(FAMILIES)}"
        )
    return FAMILIES[model_type]


def naming(model_type: str, names: Collection[str] = ()) -> Naming:
    """Return Hugging Face's names of the leaves of the models of a `model_type`.

    Args:
      model_type: as in config.json, such as "bert" or "llama".
      names: the tensor names in a file, if there is one: BERT's may have the prefix "bert.".

    Raises:
      ModelFileError: the type is unknown.
    """
    return family_of({"model_type": model_type}).naming(names)
