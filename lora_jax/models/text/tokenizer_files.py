"""The parts of a tokenizer, from a directory in Hugging Face's layout or a GGUF file."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.files.disk import gguf_file, strict_json
from lora_jax.models.text import gguf_vocabulary
from lora_jax.models.text.library_errors import library_errors

TOKENIZER, SETTINGS, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
TEMPLATE, TOOL_TEMPLATE = "chat_template.jinja", "additional_chat_templates/tool_use.jinja"
_ENDS = ("bos", "eos", "pad")
_MOST_IDS = 2**24  # `tokenizers` counts up to the largest id, and keeps those that are not there
_NAMED = ("unk_token", "sep_token", "cls_token", "mask_token")


def read_directory(directory: Path) -> dict[str, Any]:
    """Return the fields of a `Tokenizer`.

    Raises:
      FileNotFoundError: tokenizer.json is missing.
      ModelFileError: a file cannot be read, or names a token that does not exist.
    """
    path = directory / TOKENIZER
    text = _read_text(path)
    if text is None:
        raise FileNotFoundError(f"{path} is missing")
    with library_errors(f"{path} is not a tokenizer file"):
        backend = tokenizers.Tokenizer.from_str(text)
    largest = max(backend.get_vocab().values(), default=0)
    if largest >= _MOST_IDS:
        raise ModelFileError(f"{path}: an id is {largest}; ids must be below {_MOST_IDS}")
    # settings for rows of fixed length, which would change what a text encodes to
    backend.no_truncation()
    backend.no_padding()
    settings = _read_object(directory / MAP) | _read_object(directory / SETTINGS)
    _add_tokens(backend, settings.get("added_tokens_decoder"))
    with _naming(directory):
        special = {name: _special_token(settings, f"{name}_token") for name in _ENDS}
        named = {name: token for name in _NAMED if (token := _special_token(settings, name))}
    chat, tools = read_templates(directory)
    found = {"backend": backend, "named": named, "chat_template": chat, "tool_template": tools}
    return found | _existing(path, backend, special)


def read_gguf(path: Path) -> dict[str, Any]:
    """Return the fields of a `Tokenizer`.

    Raises:
      FileNotFoundError: the file does not exist.
      ModelFileError: it is not a GGUF file, or its tokenizer is not supported.
    """
    metadata = gguf_file.read(path).metadata
    with _naming(path):
        backend = gguf_vocabulary.from_metadata(metadata)
        names = {"bos": "bos", "eos": "eos", "pad": "padding"}
        special = {ours: gguf_vocabulary.token(metadata, name) for ours, name in names.items()}
        chat = _templates(metadata.get("tokenizer.chat_template")).get("default")
        tools = _templates(metadata.get("tokenizer.chat_template.tool_use")).get("default")
    found = {"backend": backend, "chat_template": chat, "tool_template": tools}
    return found | _existing(path, backend, special)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put a path in front of an error about what it contains."""
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory contains a tokenizer."""
    return (directory / TOKENIZER).is_file()


def read_templates(directory: Path) -> tuple[str | None, str | None]:
    """Return the chat template in a directory, and the one for conversations with tools.

    Raises:
      ModelFileError: a file cannot be read.
    """
    settings = _read_object(directory / SETTINGS)
    with _naming(directory / SETTINGS):
        found = _templates(settings.get("chat_template"))
    own = {"default": _read_text(directory / TEMPLATE)}
    own |= {"tool_use": _read_text(directory / TOOL_TEMPLATE)}
    found |= {name: text for name, text in own.items() if text}
    return found.get("default"), found.get("tool_use")


def _templates(value: Any) -> dict[str, str]:
    """Return templates by name: some models have several."""
    if value is None:
        return {}
    if isinstance(value, list):
        if not all(isinstance(x, dict) and {"name", "template"} <= x.keys() for x in value):
            raise ModelFileError("chat_template is a list, but not of named templates")
        found = {str(x["name"]): x["template"] for x in value}
    else:
        found = {"default": value}
    for template in found.values():
        if not isinstance(template, str):
            raise ModelFileError(f"chat_template must be a string, got {type(template).__name__}")
    return found


def _existing(
    source: Path, backend: tokenizers.Tokenizer, special: Mapping[str, str | None]
) -> dict[str, str | None]:
    """Return the special tokens; a padding token without an id is as good as none."""
    there = {x: t for x, t in special.items() if t is not None and backend.token_to_id(t) is None}
    if missing := [token for name, token in there.items() if name != "pad"]:
        raise ModelFileError(f"{source} has no token {shown(repr(missing[0]))}")
    return {name: None if name in there else token for name, token in special.items()}


def _special_token(settings: Mapping[str, Any], name: str) -> str | None:
    """Return a token that is given as text or as an object with `content`."""
    value = settings.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(value, str):
        raise ModelFileError(f"{name} must be a string, got {shown_value(value)}")
    return value


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Any) -> None:
    """Add the tokens that only the settings have, where they get the ids that these say."""
    if not isinstance(tokens, dict) or not all(map(_is_id, tokens)):
        return
    for number, token in sorted((int(i), token) for i, token in tokens.items()):
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str) or backend.token_to_id(content) is not None:
            continue
        if number == backend.get_vocab_size():
            is_special = bool(token.get("special"))
            flags = {x: bool(token.get(x)) for x in ("single_word", "lstrip", "rstrip")}
            flags["normalized"] = bool(token.get("normalized", not is_special))
            add = backend.add_special_tokens if is_special else backend.add_tokens
            add([tokenizers.AddedToken(content, **flags)])


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _read_text(path: Path) -> str | None:
    """Return a file's text, or None without a file."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is not UTF-8 text: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one without a file."""
    value = strict_json.parse_json(_read_text(path) or "{}", str(path), ModelFileError)
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return value
