"""A published model's tokenizer, with the tokens and the chat template that go with it."""

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
      backend: of the library `tokenizers`.
      bos, eos, pad: the tokens at a text's beginning and end and in the place of none, where the
        model has them.
      chat_template: Jinja source, where the model has one.
    """

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    chat_template: str | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Reads a directory in Hugging Face's layout.

        Args:
          directory: has tokenizer.json; special tokens and the chat template are taken from
            tokenizer_config.json, special_tokens_map.json and chat_template.jinja where they are.

        Raises:
          FileNotFoundError: tokenizer.json is missing.
          ModelFileError: one of the files cannot be read, or names a token that is not there.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        text = _read(path)
        if text is None:
            raise FileNotFoundError(f"{path} is missing")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises nothing more precise
            raise ModelFileError(f"{path} is no tokenizer: {error}") from error
        # for rows of fixed length, which are none of a text's own
        backend.no_truncation()
        backend.no_padding()
        settings = _object(directory / "special_tokens_map.json")
        settings |= _object(directory / "tokenizer_config.json")
        template = _read(directory / "chat_template.jinja") or settings.get("chat_template")
        return cls._checked(path, backend, _special(settings), _default(template))

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Reads the tokenizer in a GGUF file.

        Raises:
          FileNotFoundError: there is no such file.
          ModelFileError: it is no GGUF file, or its tokenizer is none that can be read.
        """
        metadata = gguf_file.read(path).metadata
        try:
            backend = gguf_vocabulary.from_metadata(metadata)
            names = {"bos": "bos", "eos": "eos", "pad": "padding"}
            special = {ours: gguf_vocabulary.token(metadata, name) for ours, name in names.items()}
        except ModelFileError as error:
            raise ModelFileError(f"{path}: {error}") from error
        return cls._checked(path, backend, special, metadata.get("tokenizer.chat_template"))

    @classmethod
    def _checked(
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
        """How many different ids there are."""
        return self.backend.get_vocab_size()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of a text.

        Args:
          text: a special token spelled out in it becomes that token.
          special: add the tokens that the model expects at the beginning and the end of a text.
        """
        return self.backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """`encode` of each text, on several threads."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ids; special tokens are left out unless `special`."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def stream(self, ids: Iterable[int], special: bool = False) -> Iterator[str]:
        """The text of ids that come one by one, in pieces that end where a character does.

        All pieces joined are `decode` of all ids.
        """
        window: list[int] = []  # ids whose text is not all out, behind some whose text is
        shown = ""
        for i in ids:
            window.append(i)
            text = self.decode(window, special)
            if len(text) > len(shown) and not text.endswith(_UNFINISHED):
                yield text[len(shown) :]
                # one id stays for those behind it: some decoders drop a space at the start
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
        """The text of a conversation, to `encode` as it is.

        Args:
          messages: one mapping a turn, `{"role": "user", "content": "..."}`.
          add_generation_prompt: end with the beginning of the assistant's turn.
          **more: what else the template reads.

        Raises:
          ChatTemplateError: the model has no chat template, or it fails.
        """
        if self.chat_template is None:
            raise ChatTemplateError("this model has no chat template")
        tokens = {f"{x}_token": getattr(self, x) or "" for x in ("bos", "eos", "pad")}
        prompt = {"add_generation_prompt": add_generation_prompt}
        return chat.render(self.chat_template, messages, **tokens | prompt | more)

    def files(self) -> dict[str, bytes]:
        """The files that `load` reads, by name, for a model's directory."""
        settings = {f"{x}_token": getattr(self, x) for x in ("bos", "eos", "pad")}
        settings |= {"chat_template": self.chat_template}
        settings = {key: value for key, value in settings.items() if value is not None}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        return {
            "tokenizer.json": self.backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        }


def _read(path: Path) -> str | None:
    """A file's text; None where there is no file."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is no text: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    try:
        value = json.loads(_read(path) or "{}")
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} holds no JSON object")
    return value


def _special(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """bos, eos and pad, each of which can stand there as text or as an object with `content`."""
    found: dict[str, str | None] = {}
    for name in ("bos", "eos", "pad"):
        value = settings.get(f"{name}_token")
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ModelFileError(f"{name}_token is {value!r}")
        found[name] = value
    return found


def _default(template: Any) -> str | None:
    """The chat template that is used without asking for one: some models have several, named."""
    if isinstance(template, list):
        if not all(isinstance(x, dict) and {"name", "template"} <= x.keys() for x in template):
            raise ModelFileError("chat_template is a list of something else than named templates")
        template = next((x["template"] for x in template if x["name"] == "default"), None)
    if template is not None and not isinstance(template, str):
        raise ModelFileError(f"chat_template is {type(template).__name__}")
    return template
