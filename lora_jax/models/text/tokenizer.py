"""A published model's tokenizer, with its special tokens and its chat template."""

import dataclasses
import datetime
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from lora_jax.core.errors import ChatTemplateError
from lora_jax.models.text import chat_template as chat
from lora_jax.models.text import content_form, tokenizer_files
from lora_jax.models.text.chat_template import Span
from lora_jax.models.text.library_errors import library_errors
from lora_jax.models.text.surroundings import beginning, without_repeats, without_trimming
from lora_jax.models.text.text_stream import TextStream

_CANNOT_ENCODE = "the tokenizer cannot encode this text"
#: Text before a text that keeps a tokenizer from adding a space at its start, tried in this order.
_ANCHORS = ("", "\n", "a", ".", "0")


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back.

    Attributes:
      backend: a tokenizer of the library `tokenizers`.
      bos, eos, pad: the tokens at the beginning and end of a text and at padding, if the model has
        them.
      chat_template: Jinja source, if the model has one.
      tool_template: the one for conversations with tools, if the model has another one for them.
      named: other special tokens that the template may use, by name: "unk_token".
      now: the time that a chat template sees; that of each call if None.
    """

    backend: tokenizers.Tokenizer
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    chat_template: str | None = None
    tool_template: str | None = None
    named: Mapping[str, str] = field(default_factory=dict, hash=False)
    now: datetime.datetime | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read a directory in Hugging Face's layout.

        Args:
          directory: contains tokenizer.json. Special tokens and the chat template come from
            tokenizer_config.json, special_tokens_map.json and chat_template.jinja, if present. A
            padding token that tokenizer.json lacks is left out: nothing here needs one.

        Raises:
          FileNotFoundError: tokenizer.json is missing.
          ModelFileError: a file cannot be read, or names a token that does not exist.
        """
        return cls(**tokenizer_files.read_directory(Path(directory)))

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Read the tokenizer in a GGUF file.

        Raises:
          FileNotFoundError: the file does not exist.
          ModelFileError: it is not a GGUF file, or its tokenizer is not supported.
        """
        return cls(**tokenizer_files.read_gguf(Path(path)))

    def of_adapter(self, directory: str | Path) -> "Tokenizer":
        """Return the tokenizer to use with an adapter on this model.

        It is the one in the adapter's directory, or this one with the chat template from there, or
        this one if the directory contains neither.

        Raises:
          ModelFileError: a file cannot be read, or names a token that does not exist.
        """
        directory = Path(directory)
        chat_template, tool_template = tokenizer_files.read_templates(directory)
        if chat_template is None:
            chat_template, tool_template = self.chat_template, self.tool_template
        has_own = tokenizer_files.has_tokenizer(directory)
        return dataclasses.replace(
            Tokenizer.load(directory) if has_own else self,
            chat_template=chat_template,
            tool_template=tool_template,
            now=self.now,
        )

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

    @library_errors(_CANNOT_ENCODE)
    def encode(self, text: str, special: bool = False) -> list[int]:
        """Encode a text.

        Args:
          text: a special token spelled out in it becomes that token.
          special: add the tokens that the model expects at the beginning and the end of a text,
            where the text itself does not spell them out.
        """
        encoding = self.backend.encode(text, add_special_tokens=special)
        return without_repeats(encoding) if special else encoding.ids

    @library_errors(_CANNOT_ENCODE)
    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Encode several texts as `encode` does, on several threads."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [without_repeats(x) if special else x.ids for x in found]

    @library_errors(_CANNOT_ENCODE)
    def encode_prompt(self, text: str) -> list[int]:
        """Encode a text to be continued: with what comes before a text, without what ends one."""
        encoding = self.backend.encode(text)
        if all(encoding.special_tokens_mask):  # none of the text itself
            return beginning(self.backend)
        return without_repeats(encoding, ended=False)

    @library_errors(_CANNOT_ENCODE)
    def encode_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Encode a text, and return which characters of it each id stands for.

        Ids that share a character, as the bytes of one that has no id, have the same span.
        """
        encoding = self._untrimmed.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        return without_trimming(self.backend)

    def encode_continued(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """Encode a prompt as `encode_prompt` does, and what the model should continue it with.

        Together they are the ids of the whole text, unless one of these would hold the end of the
        prompt and the beginning of the completion: generation starts after the prompt's own ids, so
        the completion is then encoded alone. Only where its ids would not decode to the text in
        this place, the id that holds both counts as the completion's.
        """
        asked, whole = self.encode_prompt(prompt), self.encode_prompt(prompt + completion)
        if whole[: len(asked)] == asked:
            return asked, whole[len(asked) :]
        text = self.decode(whole, special=True)
        for anchor in _ANCHORS:
            before, both = self.encode(anchor), self.encode(anchor + completion)
            rest = both[len(before) :]
            if both[: len(before)] == before and self.decode(asked + rest, special=True) == text:
                return asked, rest
        _, spans = self.encode_spans(prompt + completion)
        count = sum(end > len(prompt) for _, end in spans)
        return whole[: len(whole) - count], whole[len(whole) - count :]

    @library_errors("the tokenizer cannot decode these ids")
    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Decode ids; special tokens are left out unless `special`."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def stream(self, ids: Iterable[int], special: bool = False) -> Iterator[str]:
        """Decode ids as they arrive, in pieces that end at a character boundary.

        The pieces joined are `decode` of all ids.
        """
        text = TextStream(lambda window: self.decode(window, special))
        yield from filter(None, map(text.push, ids))
        if rest := text.end():
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
          ChatTemplateError: the model has no chat template, the template fails, or it writes
            nothing.
        """
        text = self.chat_spans(messages, add_generation_prompt, **more)[0]
        if not text:
            raise ChatTemplateError("the chat template writes nothing of the messages")
        return text

    def chat_spans(
        self,
        messages: Iterable[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        **more: Any,
    ) -> tuple[str, list[Span]]:
        """Render as `chat` does, and return what the template marks as said by the assistant.

        Templates mark it with `{% generation %}`; the list is empty where one does not.
        """
        template = self.chat_template
        if more.get("tools") is not None and self.tool_template is not None:
            template = self.tool_template
        if template is None:
            raise ChatTemplateError("this model has no chat template")
        given = {f"{x}_token": getattr(self, x) or "" for x in ("bos", "eos", "pad")}
        given |= {"tools": None, "documents": None, **self.named, **more}
        prompt = {"add_generation_prompt": add_generation_prompt}
        fitting = content_form.fit(template, messages)
        return chat.render_spans(template, fitting, self.now, **given | prompt)

    @library_errors("the tokenizer cannot be written")
    def files(self) -> dict[str, bytes]:
        """Return the files that `load` reads, by name, for a model's directory."""
        settings: dict[str, Any] = {f"{x}_token": getattr(self, x) for x in ("bos", "eos", "pad")}
        settings |= {**self.named, "chat_template": self.chat_template}
        if self.tool_template is not None:
            settings["chat_template"] = [
                {"name": "default", "template": self.chat_template},
                {"name": "tool_use", "template": self.tool_template},
            ]
        settings = {key: value for key, value in settings.items() if value is not None}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        return {
            "tokenizer.json": self.backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        }
