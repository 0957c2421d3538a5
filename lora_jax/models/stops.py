"""Where a model's text ends: the token ids that its files, its tokenizer and its template name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import AdapterFileError, ModelFileError
from lora_jax.files.disk import gguf_file, strict_json
from lora_jax.models.hf_directory import CONFIG
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.models.text.turn_end import turn_end

GENERATION_CONFIG = "generation_config.json"
_KEY = "eos_token_id"
# End of text, of a turn, and of a message that calls a tool.
_GGUF_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def stop_ids(model: str | Path | None, tokenizer: Tokenizer) -> frozenset[int]:
    """Return the token ids at which generation ends.

    They are those that generation_config.json and config.json name as `eos_token_id` (an integer
    or a list), a GGUF file's ids for the end of a text, a turn and a message, the tokenizer's
    `eos`, and the token that the chat template writes after what the assistant says.

    Args:
      model: a directory in Hugging Face's layout, a GGUF file, or None for a model without files.
      tokenizer: that of the model, or of an adapter on it.

    Raises:
      FileNotFoundError: `model` does not exist.
      ModelFileError: a file is damaged, or its `eos_token_id` is neither an integer nor a list of
        integers.
    """
    found = {tokenizer.eos_id, turn_end(tokenizer)} - {None}
    if model is not None:
        path = Path(model)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or directory")
        found |= _in_directory(path) if path.is_dir() else _in_gguf(path)
    return frozenset(i for i in found if i is not None)


def special_ids(tokenizer: Tokenizer, stops: Sequence[str]) -> frozenset[int]:
    """Return the ids of stop texts that are special tokens, which no decoded text contains."""
    added = tokenizer.backend.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special and token.content in stops)


def _in_directory(directory: Path) -> set[int]:
    return {
        i
        for name in (CONFIG, GENERATION_CONFIG)
        if (directory / name).is_file()
        for i in _named(_read(directory / name), directory / name)
    }


def _in_gguf(path: Path) -> set[int]:
    metadata = gguf_file.read(path).metadata
    return {i for key in _GGUF_KEYS if is_integer(i := metadata.get(key)) and i >= 0}


def _named(settings: Mapping[str, Any], path: Path) -> list[int]:
    """Return the ids in a settings file."""
    value = settings.get(_KEY)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [i for i in ids if not is_integer(i)]:
        raise ModelFileError(
            f"{path}: {_KEY} must be an integer or a list of integers, got {wrong[0]!r}"
        )
    return [i for i in ids if i >= 0]  # -1 stands for none


def _read(path: Path) -> dict[str, Any]:
    try:
        settings = strict_json.parse_json(path.read_bytes(), str(path))
    except (AdapterFileError, OSError) as error:
        raise ModelFileError(str(error)) from None
    if not isinstance(settings, dict):
        raise ModelFileError(f"{path}: is not a JSON object")
    return settings
