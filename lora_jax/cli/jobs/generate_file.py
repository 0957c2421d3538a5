"""What `lora-jax generate --prompts` does: rows of a file in, the same rows with an answer out."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.cli import terminal
from lora_jax.cli.errors import OutputError
from lora_jax.cli.jobs.asked_rows import AskedRow, continue_in_batches
from lora_jax.cli.jobs.several_speakers import open_speakers
from lora_jax.cli.options import BASE
from lora_jax.files.disk.atomic import write_atomically
from lora_jax.models.text.tokenizer import Tokenizer
from lora_jax.training.dataset import decode_file
from lora_jax.training.errors import DataError, list_problems
from lora_jax.training.rows.conversations import read_messages
from lora_jax.training.rows.json_values import describe, json_type


@dataclass(frozen=True)
class _Prompt:
    row: Mapping[str, Any]  # as in the file
    text: str | None
    messages: Sequence[Mapping[str, Any]]


def run(
    model: str,
    adapters: Sequence[Path | None],
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
      adapters: each answers every row; None is the base.
      out: a .jsonl file; None for standard output.
      force: write over an existing file.
      batch: rows at a time.

    Raises:
      DataError: the file cannot be read, or has rows without a prompt.
      PromptError: the model cannot generate text, or a prompt does not fit into it.
      AdapterOptionError: the adapters do not fit together.
      OutputError: there is a file already.
    """
    prompts = _read(file)
    if out is not None and out.exists() and not force:
        raise OutputError(f"{out}: exists already; add --force to write over it")
    chosen = {BASE if path is None else str(path): path for path in adapters}
    named = {name: path for name, path in chosen.items() if path is not None}

    def encode(tokenizer: Tokenizer) -> list[Sequence[int]]:
        return [_encode(tokenizer, prompt, chat, system) for prompt in prompts]

    speakers = open_speakers(model, named, encode=encode, **loading)
    lines = []
    for name in chosen:
        speaker = speakers[name]
        every = encode(speaker.tokenizer)
        rows = [AskedRow(ids, speaker.tokenizer, speaker.ends) for ids in every]
        slots = None if speaker.slot is None else [speaker.slot] * len(rows)
        said = continue_in_batches(speaker, rows, slots, seed=seed, batch=batch)
        more = {"adapter": name} if len(chosen) > 1 else {}
        lines += [
            json.dumps({**prompt.row, **more, "generated": text}, ensure_ascii=False)
            for prompt, text in zip(prompts, said, strict=True)
        ]
    data = "".join(f"{line}\n" for line in lines)
    if out is None:
        terminal.write(data)
    else:
        write_atomically(out, data.encode())


def _read(path: Path) -> list[_Prompt]:
    if path.suffix not in (".jsonl", ".ndjson", ".json"):
        raise DataError(f"{path}: --prompts takes a .jsonl file, with one JSON object per line")
    found: list[_Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(decode_file(path, "utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found.append(_prompt(line))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise DataError(f"{path}: rows that cannot be used:\n{list_problems(problems)}")
    if not found:
        raise DataError(f"{path}: the file is empty; it should contain prompts")
    return found


def _prompt(line: str) -> _Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {json_type(row)}, not an object")
    if row.get("messages") is not None:
        return _Prompt(row, None, read_messages("messages", row["messages"], may_only_ask=True))
    text = row.get("prompt")
    if not isinstance(text, str) or not text:
        raise ValueError('must have a "prompt", a text, or "messages"')
    if problem := describe("prompt", text):
        raise ValueError(problem)
    return _Prompt(row, text, ())


def _encode(tokenizer: Tokenizer, prompt: _Prompt, chat: bool, system: str | None) -> Sequence[int]:
    if prompt.text is not None and not chat and system is None:
        return tokenizer.encode_prompt(prompt.text)
    turns = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
    if system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return tokenizer.encode(tokenizer.chat(turns, add_generation_prompt=True))
