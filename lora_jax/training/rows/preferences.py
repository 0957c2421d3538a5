"""Rows of preferences: a prompt with a chosen and a rejected completion, or two whole texts."""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from lora_jax.training.rows.conversations import ASSISTANT, read_messages, read_tools
from lora_jax.training.rows.json_values import describe, json_type

Values = dict[str, Any]
SIDES = ("chosen", "rejected")
#: Before what the assistant says, in texts that are whole conversations (Anthropic's HH-RLHF).
_ASSISTANT = "\n\nAssistant:"


def read_preference(row: Mapping[str, Any]) -> Values:
    """Return the two texts of a row, "chosen" and "rejected".

    Each is a prompt and a completion, or "messages", of which the first "given" ones are the
    prompt. Completions are strings or messages, and so is the prompt: beside messages, a string is
    what the user says; beside a prompt of messages, a string is what the assistant says. Without a
    prompt, and for whole conversations beside a string, the prompt is what both texts begin with:
    messages, or characters up to the last "Assistant:", or else whole words.

    Raises:
      ValueError: what is wrong, in a few words.
    """
    prompt, sides = row.get("prompt"), [row[side] for side in SIDES]
    if sides[0] == sides[1]:
        raise ValueError("chosen and rejected are the same")
    are_messages = [_is_messages(name, x) for name, x in zip(SIDES, sides, strict=True)]
    if are_messages[0] != are_messages[1]:
        raise ValueError("one of chosen and rejected is a string and the other one is not")
    if prompt is not None and _is_messages("prompt", prompt):
        asked = read_messages("prompt", prompt, may_only_ask=True)
        more = [
            read_messages(name, x) if are_messages[0] else [_says(name, x)]
            for name, x in zip(SIDES, sides, strict=True)
        ]
        is_repeated = all(x[: len(asked)] == asked for x in more)
        whole = more if is_repeated else [[*asked, *x] for x in more]
        return _conversations(row, whole, len(asked))
    if are_messages[0]:
        whole = [read_messages(name, x) for name, x in zip(SIDES, sides, strict=True)]
        if prompt is not None and whole[0][0]["role"] == ASSISTANT:
            user = {"role": "user", "content": _text("prompt", prompt)}
            whole = [[user, *x] for x in whole]
        return _conversations(row, whole, _common(*whole))
    return _strings(prompt, *(_text(name, x) for name, x in zip(SIDES, sides, strict=True)))


def _is_messages(name: str, value: Any) -> bool:
    if isinstance(value, str):
        return value.lstrip().startswith("[{")  # from a table's column
    if not isinstance(value, list):
        raise ValueError(f"{name} is a JSON {json_type(value)}, not a string or a list of messages")
    return True


def _text(name: str, value: str) -> str:
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if problem := describe(name, value):
        raise ValueError(problem)
    return value


def _says(name: str, value: str) -> Values:
    return {"role": ASSISTANT, "content": _text(name, value)}


def _conversations(row: Mapping[str, Any], whole: list[list[dict[str, Any]]], given: int) -> Values:
    tools = read_tools(row.get("tools"))
    system = row.get("system")
    if isinstance(system, str) and system.strip() and whole[0][0]["role"] != "system":
        whole = [[{"role": "system", "content": _text("system", system)}, *x] for x in whole]
        given += 1
    for name, messages in zip(SIDES, whole, strict=True):
        if all(message["role"] != ASSISTANT for message in messages[given:]):
            raise ValueError(f"{name} contains no assistant turn after the prompt")
    more = {"tools": tools} if tools else {}
    made = [{"messages": x, "given": given, **more} for x in whole]
    return dict(zip(SIDES, made, strict=True))


def _strings(prompt: str | None, chosen: str, rejected: str) -> Values:
    given = 0
    if prompt is None:
        given = _shared(chosen, rejected)
        prompt = chosen[:given]
    elif problem := describe("prompt", prompt):
        raise ValueError(problem)
    for name, text in zip(SIDES, (chosen, rejected), strict=True):
        if not text[given:].strip():
            raise ValueError(f"{name} says nothing after what both texts begin with")
    return {
        side: {"prompt": prompt, "completion": text[given:]}
        for side, text in zip(SIDES, (chosen, rejected), strict=True)
    }


def _shared(one: str, other: str) -> int:
    """Return how many characters two texts share as a prompt.

    >>> text = "\\n\\nHuman: Hi\\n\\nAssistant:"
    >>> _shared(text + " I am well", text + " I am ill") == len(text)
    True
    >>> _shared("The sky is blue", "The sky is black") == len("The sky is")
    True
    """
    common = one[: _common(one, other)]
    turn = common.rfind(_ASSISTANT)
    if turn >= 0:
        return turn + len(_ASSISTANT)
    spaces = [space.start() for space in re.finditer(r"\s+", common)]
    return spaces[-1] if spaces else 0


def _common(one: Any, other: Any) -> int:
    """Return how many items two sequences have in common at their start."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)
