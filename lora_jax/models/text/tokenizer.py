"""A published model's tokenizer, with its special tokens and its chat template."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from lora_jax.core.errors import ChatTemplateError, ModelFileError
from lora_jax.files.disk import gguf_file
from lora_jax.models.text import chat_template as chat
from lora_jax.models.text import gguf_vocabulary

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what part of a character decodes to


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
      backend: a tokenizer of the library `tokenizers`.
      bos, eos, pad: the tokens at the beginning and end of a text and at padding, if the model has
        them.
      chat_template: Jinja source, if the model has one.
    """

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    chat_template: str | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read a directory in Hugging Face's layout.

        Args:
          directory: contains tokenizer.json. Special tokens and the chat template come from
            tokenizer_config.json, special_tokens_map.json and chat_template.jinja, if present.

        Raises:
          FileNotFoundError: tokenizer.json is missing.
          ModelFileError: a file cannot be read, or names a token that does not exist.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        text = _read_text(path)
        if text is None:
            raise FileNotFoundError(f"{path} is missing")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises nothing more precise
            raise ModelFileError(f"{path} is not a tokenizer file: {error}") from error
        # settings for rows of fixed length, which would change what a text encodes to
        backend.no_truncation()
        backend.no_padding()
        settings = _read_object(directory / "special_tokens_map.json")
        settings |= _read_object(directory / "tokenizer_config.json")
        template = _read_text(directory / "chat_template.jinja") or settings.get("chat_template")
        return cls._from_parts(
            path, backend, _special_tokens(settings), _default_template(template)
        )

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Read the tokenizer in a GGUF file.

        Raises:
          FileNotFoundError: the file does not exist.
          ModelFileError: it is not a GGUF file, or its tokenizer is not supported.
        """
        metadata = gguf_file.read(path).metadata
        try:
            backend = gguf_vocabulary.from_metadata(metadata)
            names = {"bos": "bos", "eos": "eos", "pad": "padding"}
            special = {ours: gguf_vocabulary.token(metadata, name) for ours, name in names.items()}
        except ModelFileError as error:
            raise ModelFileError(f"{path}: {error}") from error
        return cls._from_parts(path, backend, special, metadata.get("tokenizer.chat_template"))

    @classmethod
    def _from_parts(
        cls,
        source: str | Path,
        backend: tokenizers.Tokenizer,
        special: Mapping[str, str | None],
        template: Any,
    ) -> "Tokenizer":
        missing = [x for x in special.values() if x is not None and backend.token_to_id(x) is None]
        if missing:
            raise ModelFileError(f"{source} has no token {missing[0]!r}")
        return cls(backend, **special, chat_template=template)

    @property
    def bos_id(self) -> int | None:
        """The id of `bos`."""
        return self._id(self.bos)

    @property
    def eos_id(self) -> int | None:
        """The id of `eos`."""
        return self._id(self.eos)

    @property
    def pad_id(self) -> int | None:
        """The id of `pad`."""
        return self._id(self.pad)

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def __len__(self) -> int:
        """Return the number of different ids."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Encode a text.

        Args:
          text: a special token spelled out in it becomes that token.
          special: add the tokens that the model expects at the beginning and the end of a text.
        """
        return self.backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encode several texts as `encode` does, on several threads."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Decode ids; special tokens are left out unless `special`."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def stream(self, ids: Iterable[int], special: bool = False) -> Iterator[str]:
        """Decode ids as they arrive, in pieces that end at a character boundary.

        The pieces joined are `decode` of all ids.
        """
        window: list[int] = []  # ids whose text is not complete yet, after one whose text is
        shown = ""
        for i in ids:
            window.append(i)
            text = self.decode(window, special)
            if len(text) > len(shown) and not text.endswith(_UNFINISHED):
                yield text[len(shown) :]
                # one id stays as context: some decoders drop a space at the start
                window, shown = window[-1:], self.decode(window[-1:], special)
        rest = self.decode(window, special)[len(shown) :]
        if rest:
            yield rest

    def chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        **more: Any,
    ) -> str:
        """Render the text of a conversation, ready to `encode`.

        Args:
          messages: one mapping per turn, `{"role": "user", "content": "..."}`.
          add_generation_prompt: end with the start of the assistant's turn.
          **more: other variables of the template.

        Raises:
          ChatTemplateError: the model has no chat template, or the template fails.
        """
        if self.chat_template is None:
            raise ChatTemplateError("this model has no chat template")
        tokens = {f"{x}_token": getattr(self, x) or "" for x in ("bos", "eos", "pad")}
        prompt = {"add_generation_prompt": add_generation_prompt}
        return chat.render(self.chat_template, messages, **tokens | prompt | more)

    def files(self) -> dict[str, bytes]:
        """Return the files that `load` reads, by name, for a model's directory."""
        settings = {f"{x}_token": getattr(self, x) for x in ("bos", "eos", "pad")}
        settings |= {"chat_template": self.chat_template}
        settings = {key: value for key, value in settings.items() if value is not None}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        return {
            "tokenizer.json": self.backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        }


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
    try:
        value = json.loads(_read_text(path) or "{}")
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} is not a JSON object")
    return value


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return bos, eos and pad, each given as text or as an object with `content`."""
    found: dict[str, str | None] = {}
    for name in ("bos", "eos", "pad"):
        value = settings.get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ModelFileError(f"{name}_token must be a string, got {value!r}")
        found[name] = value
    return found


def _default_template(template: Any) -> str | None:
    """Return the default chat template: some models have several, by name."""
    if isinstance(template, list):
        if not all(isinstance(x, dict) and {"name", "template"} <= x.keys() for x in template):
            raise ModelFileError("chat_template is a list, but not of named templates")
        template = next((x["template"] for x in template if x["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ModelFileError(f"chat_template must be a string, got {type(template).__name__}")
    return template
