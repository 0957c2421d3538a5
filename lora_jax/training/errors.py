"""Errors in the data or during training."""

from collections.abc import Sequence

from lora_jax import LoraError


class DataError(LoraError):
    """A data file cannot be read or used; the message names the line and says what to do."""


class TrainingError(LoraError):
    """A run cannot start, continue or be resumed; the message says what to do."""


def list_problems(problems: Sequence[str], shown: int = 10) -> str:
    """Return the first problems, one per line, and how many more there are.

    >>> print(list_problems(["line 1: bad", "line 2: bad", "line 7: bad"], shown=2))
      line 1: bad
      line 2: bad
      and 1 more
    """
    lines = list(problems[:shown])
    if len(problems) > shown:
        lines.append(f"and {len(problems) - shown} more")
    return "\n".join(f"  {line}" for line in lines)
