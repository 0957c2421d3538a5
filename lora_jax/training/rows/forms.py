"""The forms that a row of data can have, each turned into one of the kinds that are trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.core.foreign import shown
from lora_jax.training.rows.choices import read_choice
from lora_jax.training.rows.conversations import read_messages, read_tools
from lora_jax.training.rows.json_values import describe, json_type
from lora_jax.training.rows.preferences import SIDES, read_preference

# kind -> the keys of its rows
KEYS = {
    "text": ("text",),
    "completion": ("prompt", "completion"),
    "chat": ("messages",),
    "label": ("text", "label"),
    "preference": SIDES,
    "choice": ("prompt", "choices", "answer"),
}
FORMS = (
    '{"text": …}, {"prompt": …, "completion": …}, {"messages": [{"role": …, "content": …}]} or '
    '{"text": …, "label": …}, {"prompt": …, "chosen": …, "rejected": …}, ShareGPT\'s '
    '{"conversations": [{"from": …, "value": …}]} or Alpaca\'s {"instruction": …, "input": …, '
    '"output": …}'
)
#: Alpaca's prompt, for models without a chat template, with an input and without.
_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
)
Values = dict[str, Any]


@dataclass(frozen=True)
class _Form:
    """Rows of one look."""

    kind: str
    keys: tuple[str, ...]  # that the row must have
    read: Callable[[Mapping[str, Any]], Values]
    more: tuple[str, ...] = ()  # that it may have


def read_row(row: Any, prefer: str | None = None) -> tuple[str, Values, list[str]]:
    """Return the kind of a row, its values, and the keys that are ignored.

    Args:
      row: a JSON value, or a row of a table, where null stands for a missing key.
      prefer: the kind of a row whose keys are those of several.

    Raises:
      ValueError: what is wrong with the row, in a few words.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {json_type(row)}, not an object")
    there = {key for key in row if row[key] is not None}
    form = _preferred(prefer, there) or form_of(row)
    if form is None:
        keys = f"the keys {', '.join(shown(repr(key)) for key in row)}" if row else "no keys"
        raise ValueError(f"has {keys}; a row must be {FORMS}")
    known = {*form.keys, *form.more}
    try:
        return form.kind, form.read(row), [key for key in row if key not in known]
    except RecursionError:
        raise ValueError("nested too deeply") from None


def form_of(row: Mapping[str, Any]) -> _Form | None:
    """Return the form of a row by its keys, those that are not null at least; None if unknown."""
    return _form_of(set(row)) or _form_of({key for key in row if row[key] is not None})


def _preferred(kind: str | None, present: set[str]) -> _Form | None:
    fits = lambda form: form.kind == kind and present.issuperset(form.keys)
    return next(filter(fits, _FORMS), None)


def _form_of(present: set[str]) -> _Form | None:
    """Return the form of a row: it has all its keys, and no others that tell a form."""
    for form in _FORMS:
        others = present & KNOWN - {*form.keys, *form.more} - _LENIENT
        if present.issuperset(form.keys) and not others:
            return form
    return None


def _text(row: Mapping[str, Any], key: str, empty: bool = False) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is a JSON {json_type(value)}, not a string")
    if not empty and not value.strip():
        raise ValueError(f"{key} is empty")
    if problem := describe(key, value):
        raise ValueError(problem)
    return value


def _answer(row: Mapping[str, Any], prompt: str) -> Values:
    return {"prompt": _text(row, prompt, empty=True), "completion": _text(row, "answer")}


def _label(row: Mapping[str, Any]) -> str | int:
    if is_integer(row["label"]):
        return int(row["label"])
    if not isinstance(row["label"], str):
        raise ValueError("label is neither a string nor an integer")
    return _text(row, "label")


def _chat(row: Mapping[str, Any], key: str) -> Values:
    messages = read_messages(key, row[key])
    if row.get("system") is not None and messages[0]["role"] != "system":
        system = _text(row, "system", empty=True)
        messages = [{"role": "system", "content": system}, *messages] if system else messages
    tools = read_tools(row.get("tools"))
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _alpaca(row: Mapping[str, Any]) -> Values:
    """Return a conversation, and Alpaca's own prompt for a model without a chat template."""
    more = {key: "" if row.get(key) is None else _text(row, key, True) for key in _ALPACA_MORE}
    instruction, output = _text(row, "instruction"), _text(row, "output")
    asked = "\n".join(filter(None, (instruction, more["input"])))
    turns = [("system", more["system"]), ("user", asked), ("assistant", output)]
    form = _ALPACA[0 if more["input"] else 1]
    prompt = form.format(instruction=instruction, input=more["input"])
    return {
        "messages": [{"role": role, "content": text} for role, text in turns if text],
        "prompt": f"{more['system']}\n\n{prompt}" if more["system"] else prompt,
        "completion": output,
    }


_ALPACA_MORE = ("input", "system")
_CHAT_MORE = ("tools", "system")
_FORMS = (
    # before "text": the first file of this form has the whole prompt as text, too
    _Form("chat", ("instruction", "output"), _alpaca, (*_ALPACA_MORE, "text")),
    _Form("label", KEYS["label"], lambda row: {"text": _text(row, "text"), "label": _label(row)}),
    _Form("text", KEYS["text"], lambda row: {"text": _text(row, "text")}),
    _Form(
        "completion",
        KEYS["completion"],
        lambda row: {
            "prompt": _text(row, "prompt", empty=True),
            "completion": _text(row, "completion"),
        },
    ),
    _Form("chat", KEYS["chat"], lambda row: _chat(row, "messages"), _CHAT_MORE),
    _Form("chat", ("conversations",), lambda row: _chat(row, "conversations"), _CHAT_MORE),
    _Form("chat", ("conversation",), lambda row: _chat(row, "conversation"), _CHAT_MORE),
    *(
        _Form("choice", (name, "choices", "answer"), partial(read_choice, prompt=name))
        for name in ("prompt", "question")
    ),
    *(
        _Form("completion", (name, "answer"), partial(_answer, prompt=name))
        for name in ("prompt", "question")
    ),
    # last: such data may have a text or messages for other training
    _Form("preference", KEYS["preference"], read_preference, ("prompt", *_CHAT_MORE)),
)
#: Keys that tell what a row is.
KNOWN = frozenset(key for form in _FORMS for key in form.keys)
#: Keys that a row may have beside those.
OPTIONAL = frozenset(key for form in _FORMS for key in form.more) - KNOWN
_LENIENT = {  # names of other things in other forms
    *("conversation", "instruction", "output", "question", "choices", "answer"),
    *SIDES,
}
