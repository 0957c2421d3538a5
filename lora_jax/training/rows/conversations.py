"""Conversations in a data file: OpenAI's messages and ShareGPT's, as lists of parts or null too."""

import json
from collections.abc import Mapping
from typing import Any

from lora_jax.core.foreign import shown
from lora_jax.training.rows.json_values import describe, json_type, without_nulls

ASSISTANT = "assistant"
#: What ShareGPT's `from` and its relatives call the roles that chat templates know.
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot", "bing", "bard"), ASSISTANT),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
    **{"system": "system", "function_call": ASSISTANT},
}
_SAYS_SOMETHING = ("tool_calls", "reasoning_content", "reasoning", "thinking")


def read_messages(name: str, value: Any, *, may_only_ask: bool = False) -> list[dict[str, Any]]:
    """Return the messages of a conversation as chat templates take them.

    ShareGPT's `from` and `value` become `role` and `content`. The content is a string or a list of
    text parts; an assistant that calls tools needs none. Keys that are null are left out.

    Args:
      name: of the value, for messages.
      value: a list of messages, or JSON of one.
      may_only_ask: whether the assistant may say nothing, as in a prompt.

    Raises:
      ValueError: what is wrong, in a few words.

    >>> read_messages("conversations", [{"from": "gpt", "value": "Hi"}])
    [{'role': 'assistant', 'content': 'Hi'}]
    """
    if isinstance(value, str) and value.lstrip().startswith("["):  # from a table's column
        value = read_json(name, value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {'an empty list' if value == [] else 'not a list'}")
    messages = [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]
    if not may_only_ask and all(message["role"] != ASSISTANT for message in messages):
        raise ValueError(f"{name} contains no assistant turn to train on")
    return messages


def read_tools(value: Any) -> list[Any]:
    """Return the tools of a conversation: a list of JSON schemas, or the same as a JSON string."""
    if value is None or value == "":
        return []
    value = read_json("tools", value) if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("tools is not a list of JSON objects")
    if problem := describe("tools", value):
        raise ValueError(problem)
    return [without_nulls(tool) for tool in value]


def read_json(name: str, text: str) -> Any:
    """Parse JSON that a row holds as a string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name} is a string that is not valid JSON") from None


def _message(name: str, message: Any) -> dict[str, Any]:
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        message = _from_sharegpt(name, message)
    if not isinstance(message, dict) or "role" not in message:
        raise ValueError(f"{name} must have role and content")
    speaks = message["role"] == ASSISTANT and any(message.get(key) for key in _SAYS_SOMETHING)
    if "content" not in message and not speaks:
        raise ValueError(f"{name} must have role and content")
    if not isinstance(message["role"], str) or not message["role"].strip():
        raise ValueError(f"{name}.role is not the name of a role")
    content = _content(f"{name}.content", message.get("content"), speaks)
    if message["role"] == ASSISTANT and not speaks and not _text(content).strip():
        raise ValueError(f"{name}.content is empty")
    if problem := describe(name, message):
        raise ValueError(problem)
    rest = without_nulls({key: x for key, x in message.items() if key not in ("role", "content")})
    return {"role": message["role"], **({} if content is None else {"content": content}), **rest}


def _from_sharegpt(name: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message["from"]
    if not isinstance(role, str) or role.lower() not in _ROLES:
        known = ", ".join(_ROLES)
        raise ValueError(f"{name}.from is {shown(repr(role))}, none of {known}")
    rest = {key: x for key, x in message.items() if key not in ("from", "value")}
    return {"role": _ROLES[role.lower()], "content": message["value"], **rest}


def _content(name: str, content: Any, may_miss: bool) -> str | list[dict[str, Any]] | None:
    if isinstance(content, str) or (content is None and may_miss):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{name} is a JSON {json_type(content)}, not a string or a list of parts")
    parts = []
    for i, part in enumerate(content):
        part = {"text": part} if isinstance(part, str) else part
        kind = part.get("type", "text") if isinstance(part, dict) else json_type(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{name}[{i}] is of type {shown(repr(kind))}; only text can be trained on"
            )
        parts.append({"type": "text", **without_nulls(part)})
    return parts


def _text(content: str | list[dict[str, Any]] | None) -> str:
    """Return the text of a content without its parts."""
    return "".join(x["text"] for x in content) if isinstance(content, list) else content or ""
