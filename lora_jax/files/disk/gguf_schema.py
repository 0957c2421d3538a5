"""The metadata of GGUF files that is used here: what each key must hold, checked before any use.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Other keys may hold anything.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.core.checks import is_integer, is_size, is_within
from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown, shown_value


class Field(NamedTuple):
    """A check of a value, and what it asks for."""

    is_valid: Callable[[Any], bool]
    what: str


def _is_strings(x: Any) -> bool:
    return isinstance(x, list)  # the reader makes lists of strings, and arrays of numbers


def _are_types(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in "iu"


def _is_pattern(x: Any) -> bool:
    return is_size(x) or (isinstance(x, np.ndarray) and x.dtype.kind in "biu" and x.ndim == 1)


_TEXT = Field(lambda x: isinstance(x, str), "a string")
_STRINGS = Field(_is_strings, "an array of strings")
_SIZE = Field(is_size, "an integer from 1 to 2³¹ - 1")
_COUNT = Field(lambda x: is_integer(x) and 0 <= x < 2**31, "an integer from 0 to 2³¹ - 1")
_FLAG = Field(lambda x: isinstance(x, bool), "true or false")
_ALIGNMENT = Field(lambda x: is_size(x) and x & (x - 1) == 0, "a power of two")

#: By key, whatever the model.
GENERAL: dict[str, Field] = {
    "general.architecture": _TEXT,
    "general.alignment": _ALIGNMENT,
    "tokenizer.ggml.model": _TEXT,
    "tokenizer.ggml.pre": _TEXT,
    "tokenizer.ggml.tokens": _STRINGS,
    "tokenizer.ggml.merges": _STRINGS,
    "tokenizer.ggml.token_type": Field(_are_types, "an array of integers"),
    # llama.cpp writes 2³² - 1, which is -1, where a model lacks the token
    **{
        f"tokenizer.ggml.{name}_token_id": Field(
            lambda x: is_integer(x) and -1 <= x < 2**32, "an integer of 32 bits"
        )
        for name in ("bos", "eos", "eot", "eom", "padding", "unknown")
    },
    **{f"tokenizer.ggml.add_{name}_token": _FLAG for name in ("bos", "eos")},
    "tokenizer.ggml.add_space_prefix": _FLAG,
    "tokenizer.ggml.scores": Field(
        lambda x: isinstance(x, np.ndarray) and x.dtype.kind in "fiu", "an array of numbers"
    ),
    "tokenizer.chat_template": _TEXT,
}

#: By key, of LoRA adapters.
ADAPTER: dict[str, Field] = {
    "general.type": _TEXT,
    "adapter.type": _TEXT,
    "adapter.lora.alpha": Field(lambda x: is_within(x, -1e30, 1e30), "a number below 1e30"),
    "general.base_model.0.name": _TEXT,
}

#: By key after the architecture, of the decoders that are supported here.
DECODER: dict[str, Field] = {
    **dict.fromkeys(("embedding_length", "feed_forward_length", "block_count"), _SIZE),
    **dict.fromkeys(("attention.head_count", "attention.head_count_kv"), _SIZE),
    **dict.fromkeys(("attention.key_length", "attention.value_length", "context_length"), _SIZE),
    "attention.layer_norm_rms_epsilon": Field(
        lambda x: is_within(x, 1e-30, 1.0), "a number from 1e-30 to 1"
    ),
    "rope.freq_base": Field(lambda x: is_within(x, 1.0, 1e15), "a number from 1 to 1e15"),
    "rope.dimension_count": _SIZE,
    "rope.scaling.type": _TEXT,
    "rope.scaling.factor": Field(lambda x: is_within(x, 0.01, 1e6), "a number from 0.01 to 1e6"),
    "rope.scaling.original_context_length": _SIZE,
    **dict.fromkeys(
        (
            *("rope.freq_base_swa", "rope.scaling.attn_factor"),
            *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
            *("attn_logit_softcapping", "final_logit_softcapping"),
        ),
        Field(lambda x: is_within(x, 1e-3, 1e15), "a number from 0.001 to 1e15"),
    ),
    "attention.sliding_window": _COUNT,
    "attention.sliding_window_pattern": Field(_is_pattern, "an integer or an array of booleans"),
    **dict.fromkeys(("expert_count", "expert_used_count"), _COUNT),
    "expert_feed_forward_length": _SIZE,
}


def check(metadata: Mapping[str, Any], fields: Mapping[str, Field], prefix: str = "") -> None:
    """Compare metadata with a table of fields.

    Args:
      metadata: by key.
      fields: `GENERAL`, or `DECODER`.
      prefix: what stands before the keys of the table: "llama.".

    Raises:
      ModelFileError: values are of another type or beyond what the key can mean; all are listed.

    >>> check({"llama.block_count": 2}, DECODER, "llama.")
    >>> check({"tokenizer.ggml.pre": 0.5}, GENERAL)
    Traceback (most recent call last):
    lora_jax.core.errors.ModelFileError: tokenizer.ggml.pre must be a string, got 0.5
    """
    problems = [
        f"{shown(prefix + key)} must be {field.what}, got {shown_value(metadata[prefix + key])}"
        for key, field in fields.items()
        if prefix + key in metadata and not field.is_valid(metadata[prefix + key])
    ]
    if problems:
        raise ModelFileError("\n".join(problems))
