"""The value of `--quantize`: a kind, or kinds by pattern."""

import contextlib
import re
from collections.abc import Iterator

from lora_jax.core.errors import ConfigError, TargetError


def parse_quantize(text: str | None) -> str | dict[str, str | None] | None:
    """Return the kinds as `models.load` takes them.

    Raises:
      ConfigError: a part between commas is not a kind, or PATTERN=KIND.

    >>> parse_quantize("nf4"), parse_quantize(None)
    ('nf4', None)
    >>> parse_quantize("embedding=int8, mlp=none, nf4")
    {'embedding': 'int8', 'mlp': None, 'all-linear': 'nf4'}
    """
    if text is None or not set(text) & {"=", ","}:
        return text
    table: dict[str, str | None] = {}
    for part in text.split(","):
        pattern, _, kind = ("all-linear=" + part if "=" not in part else part).partition("=")
        pattern, kind = pattern.strip(), kind.strip()
        if not pattern or not kind or pattern in table:
            raise ConfigError(
                f"--quantize {text[:60]!r}: give a kind such as nf4, or PATTERN=KIND,... such as "
                "embedding=int8,nf4"
            )
        table[pattern] = None if kind == "none" else kind
    return table


#: Python's words in the messages of `models.load`, and the options that mean the same.
_WORDS = (
    (r"^quantize: ", "--quantize: "),
    (r'quantize=\{"([^"]+)": None, "all-linear": "(\w+)"\}', r"--quantize \1=none,\2"),
    (r"quantize='keep'", "--quantize keep"),
    (r'\bmapping such as \{"mlp": "nf4", "all-linear": "int8"\}', "list such as mlp=nf4,int8"),
    (r"\bdtype= such as 'bfloat16'", "--dtype bfloat16"),
    (r"\bwith scan=False", "without --scan"),
)


@contextlib.contextmanager
def in_options() -> Iterator[None]:
    """Reword what `models.load` raises in the block, so that it names options of commands."""
    try:
        yield
    except (ConfigError, TargetError) as error:
        message = str(error)
        for pattern, words in _WORDS:
            message = re.sub(pattern, words, message, flags=re.MULTILINE)
        raise type(error)(message) from error
