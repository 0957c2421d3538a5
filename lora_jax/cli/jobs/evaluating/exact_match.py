"""How many generated answers are those of the data."""

from collections.abc import Sequence
from typing import Any

import lora_jax as lora
from lora_jax.cli import sources
from lora_jax.cli.jobs.asked_rows import AskedRow, continue_in_batches
from lora_jax.cli.jobs.evaluating.subject import Settings, Subject
from lora_jax.cli.jobs.speaker import Speaker
from lora_jax.training.dataset import Row, Rows
from lora_jax.training.errors import DataError
from lora_jax.training.turns import ASSISTANT

_SPARE = 8  # tokens that an answer may have more than the expected one, besides twice its own


def exact_match(files: Sequence[Rows], subject: Subject, settings: Settings) -> dict[str, Any]:
    """Return how many answers, generated greedily, equal those of the rows but for spaces around.

    The answer is the completion of a prompt, or what the assistant says last.

    Raises:
      PromptError: a prompt does not fit into the model.
    """
    tokenizer = subject.tokenizer
    asked: list[tuple[Sequence[int], str]] = []
    for rows in files:
        asked += [_ASK[rows.kind](row, tokenizer) for row in rows.rows]
    longest = max(len(tokenizer.encode(answer)) for _, answer in asked)
    model = subject.loaded.model
    is_plain = subject.adapter is None and settings.quantize is None
    speaker = Speaker(
        model=model,
        params=subject.loaded.params,
        apply=model.apply if is_plain else lora.lora(model.apply),
        tokenizer=tokenizer,
        ends=sources.stop_ids(subject.base, tokenizer),
        stops=(),
        max_tokens=settings.max_tokens or 2 * longest + _SPARE,
        sampling={},
    )
    prompts = [AskedRow(ids, tokenizer, speaker.ends) for ids, _ in asked]
    said = continue_in_batches(speaker, prompts, None, seed=0, batch=settings.batch)
    right = [text.strip() == answer.strip() for text, (_, answer) in zip(said, asked, strict=True)]
    return {"answers": len(right), "exact_match": sum(right) / len(right)}


def check(files: Sequence[Rows]) -> None:
    """Raise `DataError` for rows without an answer to generate."""
    for rows in files:
        if rows.kind not in _ASK:
            raise DataError(
                f"{rows.source} has {rows.kind} rows, but --exact-match needs prompts with "
                "completions or answers, or conversations"
            )


def _of_completion(row: Row, tokenizer: Any) -> tuple[Sequence[int], str]:
    return tokenizer.encode_prompt(row.values["prompt"]), row.values["completion"]


def _of_chat(row: Row, tokenizer: Any) -> tuple[Sequence[int], str]:
    messages = row.values["messages"]
    last = max(i for i, message in enumerate(messages) if message["role"] == ASSISTANT)
    tools = {"tools": row.values["tools"]} if row.values.get("tools") else {}
    text = tokenizer.chat(messages[:last], add_generation_prompt=True, **tools)
    content = messages[last].get("content") or ""
    answer = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return tokenizer.encode(text), answer


_ASK = {"completion": _of_completion, "chat": _of_chat}
