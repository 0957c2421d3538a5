"""Errors of the library in the words of the command line."""

import contextlib
import re
from collections.abc import Iterator

from lora_jax.cli.train_options import TrainOptions
from lora_jax.core.errors import LoraError

#: Python's words in the messages of `lora_jax.init`, and the options that mean the same. In a
#: replacement, {name} is the value of an option.
_RULES = (
    (r",? ?overrides=\{.*?\)\},?", ","),
    (r'\binit="(\w+)"', r"--init \1"),
    (r'\bbias="(\w+)": no leaf named bias or b is a bias\. Name it with train=', None),
    (r'\bbias="(\w+)"', r"--bias \1"),
    (r"\blayers: (\(.*?\)|slice\(.*?\)|-?\d+) selects", "--layers '{layers}' selects"),
    (r"(?m)^(targets|exclude|train|layers|rank|alpha|dropout|bias|init)\b(?= must|:)", r"--\1"),
    (r"\b(exclude|train|layers|rank|bias)=", r"--\1"),
    (r"\brank (\d+) is above", r"--rank \1 is above"),
    (r"\bin targets and in train\b", "in --targets and in --train"),
    (r", or say where the numbers are with layers_pattern=|\. Say where .*layers_pattern=", ""),
    (r"\bfrom targets\b", "from --targets"),
)
_NO_BIAS = "--bias {bias}: the model has no biases"


@contextlib.contextmanager
def in_options(options: TrainOptions) -> Iterator[None]:
    """Reword a `LoraError` of the block, so that it names options, not parameters of Python."""
    try:
        yield
    except LoraError as error:
        raise type(error)(reword(str(error), options)) from error


def reword(message: str, options: TrainOptions) -> str:
    """Return a message of `lora_jax.init` in the words of the command line.

    >>> import pathlib
    >>> options = TrainOptions("tiny", [pathlib.Path("a.txt")], pathlib.Path("run"))
    >>> reword("q: in targets and in train; choose one", options)
    'q: in --targets and in --train; choose one'
    """
    values = {name: str(value) for name, value in vars(options).items()}
    for pattern, words in _RULES:
        filled = _fill(_NO_BIAS if words is None else words, values)
        message = re.sub(pattern, filled, message)
    for name, several in options.lists.items():
        message = re.sub(rf"--{name}\b(?!-)", f"--{several}", message)
    return message


def _fill(words: str, values: dict[str, str]) -> str:
    for name in ("layers", "bias"):
        words = words.replace(f"{{{name}}}", values[name].replace("\\", r"\\"))
    return words
