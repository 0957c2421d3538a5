"""The value of `--quantize`: a kind, or kinds by pattern."""

from lora_jax.core.errors import ConfigError


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
