"""Read the messages of a conversation, as OpenAI's clients send them."""

from typing import Any

from lora_jax.core.foreign import shown_value
from lora_jax.serving.errors import RequestError
from lora_jax.serving.fields import wrong

#: OpenAI's roles, and what chat templates call them.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def read_messages(given: Any) -> list[dict[str, str]]:
    """Return the messages with their roles and texts.

    Raises:
      RequestError: there are none, or one is not a text by one of `ROLES`.

    >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    [{'role': 'user', 'content': 'Hi'}]
    """
    if not isinstance(given, list) or not given:
        raise wrong("messages", "a list of at least one message", given)
    return [_read_message(message, f"messages[{n}]") for n, message in enumerate(given)]


def _read_message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise wrong(name, 'an object such as {"role": "user", "content": "..."}', message)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{name}.role", f"one of {', '.join(ROLES)}", role)
    others = {key for key, x in message.items() if x is not None} - {"role", "content", "name"}
    for key in sorted(others):
        if message[key] != []:
            raise RequestError(
                f"{name} has a field {shown_value(key)}, which this server does not support",
                param=name,
                code="unsupported_parameter",
            )
    return {"role": ROLES[role], "content": _read_content(message.get("content"), name)}


def _read_content(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [x.get("text") for x in parts if isinstance(x, dict) and x.get("type") == "text"]
    if not parts or len(texts) != len(parts) or not all(isinstance(x, str) for x in texts):
        raise wrong(f"{name}.content", "a string, or a list of parts of type text", content)
    return "".join(map(str, texts))
