"""Content of messages as a chat template takes it: a string, or a list of parts."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.core.errors import ChatTemplateError
from lora_jax.models.text import chat_template as chat

_MARK = "Words0"


def fit(template: str, messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages whose content has the form that a template takes.

    Templates of text models write a list of parts as Python does, brackets and all; some of models
    that see images write nothing of a string.

    >>> parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    >>> fit("{{ messages[0].content }}", [{"role": "user", "content": parts}])
    [{'role': 'user', 'content': 'a b'}]
    """
    return [_fit(template, message) for message in messages]


def _fit(template: str, message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if isinstance(content, list) and not _writes_parts(template):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return {**message, "content": "".join(map(str, texts))}
    if isinstance(content, str) and not _writes_text(template) and _writes_parts(template):
        return {**message, "content": _part(content)}
    return message


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


@functools.lru_cache(maxsize=16)
def _writes_text(template: str) -> bool:
    return _MARK in _tried(template, _MARK)


@functools.lru_cache(maxsize=16)
def _writes_parts(template: str) -> bool:
    text = _tried(template, _part(_MARK))
    return _MARK in text and "'type'" not in text and '"type"' not in text


def _tried(template: str, content: Any) -> str:
    """Render one turn of the user; a template that refuses it writes nothing."""
    given: dict[str, Any] = {"bos_token": "", "eos_token": "", "tools": None, "documents": None}
    given["add_generation_prompt"] = False
    try:
        return chat.render(template, [{"role": "user", "content": content}], **given)
    except ChatTemplateError:
        return ""
