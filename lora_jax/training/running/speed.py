"""How fast a step was, for its record in the log and for the line of progress."""

import math
from typing import Any

from lora_jax.training.log import Record
from lora_jax.training.running.memory import peak_bytes


def speed(record: Record, flops: int | None) -> dict[str, Any]:
    """Return the fields of a step's record that say how fast it was.

    Args:
      record: with "tokens", those that the loss counts, and "seconds", those of the step.
      flops: operations of a step, as `flops.flops` counts them; None if they are not known.

    Returns:
      "tokens_per_second"; "flops" and "flops_per_second" if they are known; "peak_bytes", the most
      memory so far, if that is.
    """
    seconds = max(record["seconds"], 1e-4)  # which the log rounds to
    peak = peak_bytes()
    known = {} if flops is None else {"flops": flops, "flops_per_second": round(flops / seconds)}
    return {
        "tokens_per_second": round(record["tokens"] / seconds, 1),
        **known,
        **({} if peak is None else {"peak_bytes": peak}),
    }


def in_units(value: float, unit: str) -> str:
    """Return a number with three digits and a prefix of the SI.

    >>> in_units(1.9e14, "FLOP/s"), in_units(27.3e9, "B"), in_units(999.6, "B"), in_units(0, "B")
    ('190 TFLOP/s', '27.3 GB', '1.00 kB', '0.00 B')
    """
    power = 0
    while float(f"{value:.3g}") >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    digits = 2 - math.floor(math.log10(float(f"{value:.3g}"))) if value else 2
    return f"{value:.{max(0, digits)}f} {_PREFIXES[power]}{unit}"


_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
