"""Chat templates: a published model's Jinja program for the text of a conversation.

The program comes with the model's files, so it runs in Jinja's sandbox: it sees no attributes of
Python objects and cannot change its inputs. It can still waste time and memory.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from lora_jax.core.errors import ChatTemplateError

LONGEST = 10_000_000  # characters of output
# Around what a {% generation %} block writes, until the text is complete: characters of no text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one and the same field

#: First and last character, exclusive, of a part of a text.
Span = tuple[int, int]


def render(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    now: datetime.datetime | None = None,
    **variables: Any,
) -> str:
    """Render the text of a conversation, as transformers does.

    Args:
      template: Jinja source, as in tokenizer_config.json and GGUF files.
      messages: one mapping per turn, `{"role": "user", "content": "..."}`. A key whose value is
        None counts as missing.
      now: what `strftime_now` tells; the time of the call if None.
      **variables: other variables of the template: `add_generation_prompt`, `bos_token`, `tools`.

    Raises:
      ChatTemplateError: the template is broken, does what the sandbox forbids, writes more than
        `LONGEST` characters, or refuses these messages.

    >>> render("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    ...        [{"role": "user", "content": "hi"}])
    '<user>hi'
    """
    return render_spans(template, messages, now, **variables)[0]


def render_spans(
    template: str,
    messages: Iterable[Mapping[str, Any]],
    now: datetime.datetime | None = None,
    **variables: Any,
) -> tuple[str, list[Span]]:
    """Render as `render` does, and return where `{% generation %}` blocks are in the text.

    >>> render_spans("{% for m in messages %}<a>{% generation %}{{ m.content }}"
    ...              "{% endgeneration %}{% endfor %}", [{"role": "assistant", "content": "ho"}])
    ('<a>ho', [(3, 5)])
    """
    tell = lambda form: (now or datetime.datetime.now()).strftime(form)
    text, length = [], 0
    try:
        program = _compile(template)
        turns = list(map(_plain, messages))
        for piece in program.generate(messages=turns, strftime_now=tell, **variables):
            text.append(piece)
            length += len(piece)
            if length > LONGEST:
                raise ChatTemplateError(f"it writes more than {LONGEST} characters")
    except Exception as error:  # a template can raise whatever a Python expression can
        said = " ".join(str(error).split()) or type(error).__name__
        raise ChatTemplateError(f"the chat template failed: {said}") from error
    return _take_out_marks("".join(text))


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without missing values, its reasoning under all the names in use."""
    there = {key: value for key, value in message.items() if value is not None}
    reasoning = next((there[key] for key in _REASONING if key in there), None)
    if reasoning is None:
        return there
    return {"thinking": reasoning, **there, "reasoning_content": reasoning}


def _take_out_marks(text: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    at = start = 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece == _OPEN:
            start = at
        elif piece == _CLOSE:
            spans.append((start, at))
        else:
            pieces.append(piece)
            at += len(piece)
    return "".join(pieces), spans


@functools.lru_cache(maxsize=16)
def _compile(template: str) -> Any:
    return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
    """Set up Jinja as transformers does, for which published templates are written."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that holds what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 -- as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{_OPEN}{caller()}{_CLOSE}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' filter does; that of Jinja escapes what HTML would."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> NoReturn:
    raise ChatTemplateError(message)
