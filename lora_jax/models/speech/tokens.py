"""The special tokens of Whisper: `generation_config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ConfigError, ModelFileError
from lora_jax.core.foreign import shown_value
from lora_jax.models import hf_directory
from lora_jax.models.speech.timestamps import Timestamps

CONFIG = "generation_config.json"


@dataclass(frozen=True)
class SpeechTokens:
    """Which tokens begin a transcript, and which are not chosen.

    Attributes:
      start: `<|startoftranscript|>`.
      end: `<|endoftext|>`.
      no_timestamps: `<|notimestamps|>`, in front of the first timestamp; None if there are none.
      languages: token of each language, such as "<|en|>"; empty for a model of English.
      tasks: token of "transcribe" and "translate".
      suppress, begin_suppress: as in `transcribe`.
      latest_start: as in `Timestamps`.

    >>> tokens = SpeechTokens(1, 2, 5, {"<|en|>": 3}, {"transcribe": 4})
    >>> tokens.prompt("en"), tokens.prompt("en", timestamps=True)
    ([1, 3, 4, 5], [1, 3, 4])
    """

    start: int
    end: int
    no_timestamps: int | None = None
    languages: Mapping[str, int] = field(default_factory=dict)
    tasks: Mapping[str, int] = field(default_factory=dict)
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    latest_start: int | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "SpeechTokens":
        """Read a model's `generation_config.json`.

        Raises:
          FileNotFoundError: the directory has none.
          ModelFileError: it is not valid JSON, or has no tokens that can be used.
        """
        settings = hf_directory.read_config(directory, CONFIG)
        try:
            return cls(
                start=_token(settings, "decoder_start_token_id"),
                end=_token(settings, "eos_token_id"),
                no_timestamps=_or_none(settings, "no_timestamps_token_id"),
                languages=_by_name(settings, "lang_to_id"),
                tasks=_by_name(settings, "task_to_id"),
                suppress=_tokens(settings, "suppress_tokens"),
                begin_suppress=_tokens(settings, "begin_suppress_tokens"),
                latest_start=_or_none(settings, "max_initial_timestamp_index"),
            )
        except ValueError as error:
            raise ModelFileError(f"{Path(directory) / CONFIG}: {error}") from None

    def prompt(
        self, language: str | None = None, task: str = "transcribe", *, timestamps: bool = False
    ) -> list[int]:
        """Return the tokens in front of a transcript.

        Args:
          language: such as "en"; None for a model of English.
          task: "transcribe", or "translate" to English.
          timestamps: whether the transcript has them.

        Raises:
          ConfigError: the model does not know the language or the task, or needs a language.
        """
        found = [self.start]
        if self.languages:
            name = f"<|{language.strip('<|>')}|>" if isinstance(language, str) else language
            found += [_known("language", name, self.languages), _known("task", task, self.tasks)]
        elif language not in (None, "en") or task != "transcribe":
            raise ConfigError(
                f"language {shown_value(language)} and task {shown_value(task)}: this model only "
                "transcribes English; leave them out"
            )
        if not timestamps and self.no_timestamps is not None:
            found.append(self.no_timestamps)
        return found

    @property
    def timestamps(self) -> Timestamps:
        """The rules of timestamps.

        Raises:
          ConfigError: the model has none.
        """
        if self.no_timestamps is None:
            raise ConfigError(
                "timestamps: this model has no no_timestamps_token_id, so no timestamps"
            )
        return Timestamps(self.no_timestamps + 1, self.end, self.latest_start)


def _known(what: str, name: Any, table: Mapping[str, int]) -> int:
    if name not in table:
        raise ConfigError(f"{what} {shown_value(name)} is not one of {sorted(table)}")
    return table[name]


def _token(settings: Mapping[str, Any], name: str) -> int:
    value = settings.get(name)
    if not is_integer(value) or value < 0:
        raise ValueError(f"{name} must be the number of a token, got {shown_value(value)}")
    return value


def _or_none(settings: Mapping[str, Any], name: str) -> int | None:
    return None if settings.get(name) is None else _token(settings, name)


def _tokens(settings: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = settings.get(name)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(is_integer(x) and x >= 0 for x in value):
        raise ValueError(f"{name} must be a list of tokens, got {shown_value(value)}")
    return tuple(value)


def _by_name(settings: Mapping[str, Any], name: str) -> dict[str, int]:
    value = settings.get(name)
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object of tokens, got {shown_value(value)}")
    return {key: _token(value, key) for key in value}
