"""The value of `--layers`: numbers, or a slice."""

from lora_jax.core.errors import ConfigError


def parse_layers(text: str) -> slice | tuple[int, ...] | None:
    """Return the layers as `LoraConfig` takes them; None, for all layers, of an empty text.

    Raises:
      ConfigError: it is neither a list of numbers and ranges nor a slice.

    >>> parse_layers("-4:"), parse_layers("0,3-5,-1"), parse_layers("")
    (slice(-4, None, None), (0, 3, 4, 5, -1), None)
    """
    text = text.strip()
    if not text:
        return None
    try:
        if ":" in text:
            ends = [int(end) if end.strip() else None for end in text.split(":")]
            if len(ends) > 3 or (len(ends) == 3 and ends[2] == 0):
                raise ValueError
            return slice(*ends)
        return tuple(number for part in text.split(",") for number in _numbers(part.strip()))
    except ValueError:
        raise ConfigError(
            f"--layers {text[:40]!r}: give numbers such as 0,1,-1, ranges such as 3-5, or a slice "
            "such as -4: for the last four layers"
        ) from None


def _numbers(part: str) -> range:
    """Return the numbers of "7", "-1" or "3-5"."""
    first, dash, last = part[1:].partition("-")
    if not dash:
        return range(int(part), int(part) + 1)
    numbers = range(int(part[0] + first), int(last) + 1)
    if not numbers or numbers[0] < 0:
        raise ValueError
    return numbers
