"""The errors and the warning of lora_jax; messages name the parameter path and what to do."""

import re
import sys
import warnings
from collections.abc import Iterable

from lora_jax.core.foreign import escaped

_AT_ONCE = 3  # problems of one kind up to this number have a line each
_NAMED = 3  # paths of a larger group that are named


class LoraError(ValueError):
    """Base class of the errors that lora_jax raises on bad input; it is a `ValueError`.

    The message may quote a file: control characters are escaped, and a very long one is shortened.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(escaped(str(message)))


class ConfigError(LoraError):
    """A field of `LoraConfig`, or another argument, has a value without meaning."""


class TargetError(LoraError):
    """A pattern matches no parameter, or a targeted leaf cannot be adapted."""


class LayoutError(LoraError):
    """It is unknown or contradictory which axes of a weight are batch, in and out."""


class StructureError(LoraError):
    """Parameter trees, or a weight and its factors, do not fit together."""


class MergeError(LoraError):
    """A merge would write NaN or infinity into the base, or an unmerge cannot recover it."""


class AdapterFileError(LoraError):
    """An adapter file is damaged, has an unknown format, or does not fit the base."""


class ModelFileError(LoraError):
    """A file of a published model or tokenizer is damaged or has an unknown format."""


class ChatTemplateError(LoraError):
    """A chat template is malformed, violates its sandbox, or rejects the conversation."""


class OtherProcessError(LoraError):
    """Another process of the same program failed, so this one stops too.

    Attributes:
      process: the number of the one that failed.
      reason: its message.
    """

    def __init__(self, process: int, reason: str) -> None:
        super().__init__(f"process {process}: {reason}")
        self.process, self.reason = process, reason


class AssetError(RuntimeError):
    """A published file cannot be downloaded; the message says what to do in one line."""


class DenseError(LoraError):
    """A weight would be materialized, and `on_dense="error"` forbids it."""


class DenseWarning(UserWarning):
    """A weight was materialized: the result is correct, but costs the memory of a weight."""


class BaseKindWarning(UserWarning):
    """Adapters were loaded on weights that are quantized in another way than in their training."""


class LeftOutWarning(UserWarning):
    """`targets="all-linear"` left out a matrix that the function uses in another way."""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's that called lora_jax."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals["__name__"].startswith("lora_jax."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def grouped(problems: Iterable[str], noun: str = "weights") -> str:
    """Join problems into lines, one for all problems of a kind.

    Args:
      problems: sentences such as "path: what is wrong". They are of one kind if they differ only in
        the path, in numbers, and in what follows a semicolon.
      noun: what the paths are, in the plural.

    >>> print(grouped(["b: is odd", *(f"h/{i}/w: rank 9 is above {i}" for i in range(12))]))
    b: is odd
    12 weights (h/0/w, h/1/w, h/2/w and 9 more): for the first, rank 9 is above 0
    """
    kinds: dict[str, list[tuple[int, str, str]]] = {}
    for i, problem in enumerate(problems):
        path, _, sentence = problem.partition(": ")
        kinds.setdefault(_kind(path, sentence), []).append((i, path, sentence))
    lines: dict[int, str] = {}
    for group in kinds.values():
        if len({path for _, path, _ in group}) <= _AT_ONCE:
            lines |= {i: f"{path}: {sentence}" if sentence else path for i, path, sentence in group}
            continue
        named = ", ".join(path for _, path, _ in group[:_NAMED])
        first = "" if len({sentence for *_, sentence in group}) == 1 else "for the first, "
        start = f"{len(group)} {noun} ({named} and {len(group) - _NAMED} more)"
        lines[group[0][0]] = f"{start}: {first}{group[0][2]}"
    return "\n".join(line for _, line in sorted(lines.items()))


def _kind(path: str, sentence: str) -> str:
    """Return what all sentences of one kind have in common; a line without a path is alone."""
    if not sentence:
        return path
    itself = rf"(?<![\w/.]){re.escape(path)}(?![\w/.])"
    return re.sub(r"\d+", "#", re.sub(itself, "", sentence.partition(";")[0]))
