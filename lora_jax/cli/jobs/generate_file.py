"""What `lora-jax generate --prompts` does: rows of a file in, the same rows with an answer out."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.cli import terminal
from lora_jax.cli.adapter_names import Chosen
from lora_jax.cli.errors import OutputError
from lora_jax.cli.jobs.asked_rows import AskedRow, continue_in_batches
from lora_jax.cli.jobs.several_speakers import open_speakers
from lora_jax.cli.jobs.speaker import Speaker
from lora_jax.cli.options import BASE
from lora_jax.core.foreign import shown
from lora_jax.files.disk.atomic import write_atomically
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.training.dataset import decode_file
from lora_jax.training.errors import DataError, list_problems
from lora_jax.training.rows.conversations import read_messages
from lora_jax.training.rows.json_values import describe, json_type

_ADAPTER = "adapter"  # the key of a row
_NONE = "none"  # the base's other name
_ROWS = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class _Prompt:
    place: str  # in the file, for messages
    row: Mapping[str, Any]  # as in the file
    text: str | None
    messages: Sequence[Mapping[str, Any]]

    @property
    def adapter(self) -> Any:
        """The adapter that the row names; None for each of those that there are."""
        return self.row.get(_ADAPTER)


@dataclass(frozen=True)
class _Asked:
    """A prompt, and the adapter that is to answer it."""

    prompt: _Prompt
    adapter: str


def run(
    model: str,
    adapters: Sequence[Chosen],
    file: Path,
    out: Path | None,
    *,
    force: bool,
    batch: int,
    chat: bool,
    system: str | None,
    seed: int,
    **loading: Any,
) -> None:
    """Write each row of a file with "generated", and with "adapter" if there are several.

    Args:
      adapters: each answers every row that names none.
      out: a .jsonl file; None for standard output.
      force: write over an existing file.
      batch: rows at a time.

    Raises:
      DataError: the file cannot be read, has rows without a prompt, or names another adapter.
      PromptError: the model cannot generate text, or a prompt does not fit into it.
      AdapterOptionError: the adapters do not fit together.
      OutputError: there is a file already.
    """
    prompts = _read(file)
    if out is not None and out.exists() and not force:
        raise OutputError(f"{out}: exists already; add --force to write over it")
    chosen = {one.name: one.path for one in adapters}
    asked = _asked(file, prompts, chosen)
    named = {name: path for name, path in chosen.items() if path is not None}

    def encode(tokenizer: Tokenizer) -> list[Sequence[int]]:
        return [_encode(tokenizer, prompt, chat, system) for prompt in prompts]

    speakers = open_speakers(model, named, encode=encode, **loading)
    ids = lambda one, tokenizer: _encode(tokenizer, one.prompt, chat, system)
    said = _answers(asked, speakers, ids, seed, batch)
    lines = []
    for one, text in zip(asked, said, strict=True):
        more = {_ADAPTER: one.adapter} if len(chosen) > 1 else {}
        row = {**one.prompt.row, **more, "generated": text}
        lines.append(json.dumps(row, ensure_ascii=False))
    data = "".join(f"{line}\n" for line in lines)
    if out is None:
        terminal.write(data)
    else:
        write_atomically(out, data.encode())


def _asked(
    file: Path, prompts: Sequence[_Prompt], chosen: Mapping[str, Path | None]
) -> list[_Asked]:
    """Return which adapter answers which prompt: one after the other, or in the file's order.

    The order is the file's if a row names its adapter.

    Raises:
      DataError: a row names an adapter that is not there.
    """
    if all(prompt.adapter is None for prompt in prompts):
        return [_Asked(prompt, name) for name in chosen for prompt in prompts]
    found: list[_Asked] = []
    problems = []
    for prompt in prompts:
        if prompt.adapter is None:
            found += [_Asked(prompt, name) for name in chosen]
        elif (name := _known(prompt.adapter, chosen)) is not None:
            found.append(_Asked(prompt, name))
        else:
            problems.append(f"{prompt.place}: {shown(prompt.adapter)}")
    if problems:
        raise DataError(
            f"{file}: rows name adapters that no --adapter gives; there are "
            f"{', '.join(map(shown, chosen))}:\n{list_problems(problems)}"
        )
    return found


def _answers(
    asked: Sequence[_Asked],
    speakers: Mapping[str, Speaker],
    encode: Callable[[_Asked, Tokenizer], Sequence[int]],
    seed: int,
    batch: int,
) -> list[str]:
    """Return what is generated for each prompt; a batch mixes the adapters that are a stack."""
    together: dict[int, list[int]] = {}
    for i, one in enumerate(asked):
        together.setdefault(id(speakers[one.adapter].params), []).append(i)
    found = [""] * len(asked)
    for places in together.values():
        every = [speakers[asked[i].adapter] for i in places]
        rows = [
            AskedRow(encode(asked[i], by.tokenizer), by.tokenizer, by.ends)
            for i, by in zip(places, every, strict=True)
        ]
        slots = [by.slot for by in every if by.slot is not None]
        texts = continue_in_batches(every[0], rows, slots or None, seed=seed, batch=batch)
        for i, text in zip(places, texts, strict=True):
            found[i] = text
    return found


def _known(name: Any, chosen: Mapping[str, Path | None]) -> str | None:
    """Return the adapter that a row means: by its name, or by the last part of its path."""
    if name in (BASE, _NONE) and None in chosen.values():
        return next(known for known, path in chosen.items() if path is None)
    if not isinstance(name, str) or name in chosen:
        return name if isinstance(name, str) else None
    fits = [known for known, path in chosen.items() if path is not None and path.name == name]
    return fits[0] if len(fits) == 1 else None


def _read(path: Path) -> list[_Prompt]:
    if path.suffix not in (*_ROWS, ".txt"):
        raise DataError(
            f"{path}: --prompts takes a .jsonl file, with one JSON object per line, or a .txt "
            "file, with one prompt per line"
        )
    found: list[_Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(decode_file(path, "utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            row = _parse(line) if path.suffix in _ROWS else {"prompt": line.removesuffix("\r")}
            found.append(_prompt(place, row))
        except ValueError as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise DataError(f"{path}: rows that cannot be used:\n{list_problems(problems)}")
    if not found:
        raise DataError(f"{path}: the file is empty; it should contain prompts")
    return found


def _parse(line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {json_type(row)}, not an object")
    return row


def _prompt(place: str, row: Mapping[str, Any]) -> _Prompt:
    if row.get("messages") is not None:
        messages = read_messages("messages", row["messages"], may_only_ask=True)
        return _Prompt(place, row, None, messages)
    text = row.get("prompt")
    if not isinstance(text, str) or not text:
        raise ValueError('must have a "prompt", a text, or "messages"')
    if problem := describe("prompt", text):
        raise ValueError(problem)
    return _Prompt(place, row, text, ())


def _encode(tokenizer: Tokenizer, prompt: _Prompt, chat: bool, system: str | None) -> Sequence[int]:
    if prompt.text is not None and not chat and system is None:
        return tokenizer.encode_prompt(prompt.text)
    turns = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
    if system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return tokenizer.encode(tokenizer.chat(turns, add_generation_prompt=True))
