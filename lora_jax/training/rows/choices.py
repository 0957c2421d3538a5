"""Questions with several answers to choose from, one of which is right."""

import string
from collections.abc import Mapping
from typing import Any

from lora_jax.core.checks import is_integer
from lora_jax.core.foreign import shown
from lora_jax.training.rows.conversations import read_json
from lora_jax.training.rows.json_values import describe, json_type


def read_choice(row: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """Return "prompt", "choices" (two strings or more) and "answer", the number of the right one.

    Args:
      row: with "choices", a list or JSON of one, and "answer": the number of a choice, counted from
        0, the choice itself, or a letter from A.
      prompt: the key of the prompt.

    Raises:
      ValueError: what is wrong, in a few words.

    >>> row = {"question": "2 + 2 =", "choices": ["3", "4"], "answer": "B"}
    >>> read_choice(row, "question")
    {'prompt': '2 + 2 =', 'choices': ['3', '4'], 'answer': 1}
    """
    text, choices = row[prompt], row["choices"]
    if not isinstance(text, str):
        raise ValueError(f"{prompt} is a JSON {json_type(text)}, not a string")
    if isinstance(choices, str):  # from a table's column
        choices = read_json("choices", choices)
    if not isinstance(choices, list) or not all(isinstance(x, str) for x in choices):
        raise ValueError("choices is not a list of strings")
    if len(choices) < 2 or not all(x.strip() for x in choices):
        raise ValueError("choices must be two texts or more, none of them empty")
    if len(set(choices)) < len(choices):
        raise ValueError("choices contains the same text twice")
    if problem := describe(prompt, text) or describe("choices", choices):
        raise ValueError(problem)
    return {"prompt": text, "choices": choices, "answer": _number(row["answer"], choices)}


def _number(answer: Any, choices: list[str]) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    letters = string.ascii_uppercase[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return letters.index(answer)
    if isinstance(answer, str) and answer.isascii() and answer.isdigit():  # of a table
        answer = int(answer[:9])
    if is_integer(answer) and 0 <= answer < len(choices):
        return int(answer)
    raise ValueError(
        f"answer is {shown(repr(answer))}: neither a choice, nor its letter, nor its number from "
        f"0 to {len(choices) - 1}"
    )
