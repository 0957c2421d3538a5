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
    POST_NORMS,
    QWEN_MOE_FILES,
    of_experts,
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
    "qwen2": _llama(stem="Qwen2"),
    "qwen3": _llama(stem="Qwen3"),
    "gemma": _llama(stem="Gemma"),
    "gemma2": _llama(stem="Gemma2", naming=partial(_fixed, POST_NORMS)),
    "gemma3_text": _llama(stem="Gemma3", naming=partial(_fixed, POST_NORMS)),
    "phi3": _llama(stem="Phi3"),
    "smollm3": _llama(stem="SmolLM3"),
    "olmo2": _llama(stem="Olmo2", naming=partial(_fixed, POST_NORMS)),
    "granite": _llama(stem="Granite"),
    "mixtral": _llama(stem="Mixtral", **_of_experts(MIXTRAL_FILES)),
    "qwen3_moe": _llama(stem="Qwen3Moe", **_of_experts(QWEN_MOE_FILES)),
    "gpt_oss": _llama(stem="GptOss", naming=partial(_fixed, GPT_OSS)),
}
#: The regex of the copy of a tied head, which follows from the rest too.
TIED_HEAD = r"lm_head\.weight"


def is_tied(settings: Mapping[str, Any]) -> bool:
    """Return whether the head of a decoder is its embedding, by its parsed config.json."""
    key, row = "tie_word_embeddings", MODEL_TYPES.get(str(settings.get("model_type")))
    default = False if row is None else row.defaults.get(key, False)
    given = settings.get(key)
    return bool(default if given is None else given)


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
