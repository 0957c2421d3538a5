"""Chat templates: a published model's Jinja program for the text of a conversation.

The program comes with the model's files, so it runs in Jinja's sandbox: it sees no attributes of
Python objects and cannot change its inputs. It can still waste time and memory.
"""

import datetime
import json
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from lora_jax.core.errors import ChatTemplateError

LONGEST = 10_000_000  # characters of output


def render(template: str, messages: Iterable[Mapping[str, Any]], **variables: Any) -> str:
    """Render the text of a conversation.

    Args:
      template: Jinja source, as in tokenizer_config.json and GGUF files.
      messages: one mapping per turn, `{"role": "user", "content": "..."}`.
      **variables: other variables of the template: `add_generation_prompt`, `bos_token`, `tools`.

    Raises:
      ChatTemplateError: the template is broken, does what the sandbox forbids, writes more than
        `LONGEST` characters, or refuses these messages.

    >>> render("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ...        [{"role": "user", "content": "hi"}])
    '<user>hi'
    """
    text, length = [], 0
    try:
        program = _environment().from_string(template)
        for piece in program.generate(messages=list(messages), **variables):
            text.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise ChatTemplateError(f"it writes more than {LONGEST} characters")
    except Exception as error:  # a template can raise whatever a Python expression can
        said = " ".join(str(error).split()) or type(error).__name__
        raise ChatTemplateError(f"the chat template failed: {said}") from error
    return "".join(text)


def _environment() -> Any:
    """Set up Jinja as transformers does, for which published templates are written."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise ChatTemplateError(message)
