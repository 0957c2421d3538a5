"""`Metrics`: what a server has counted, in the text format of Prometheus."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PREFIX = "lora_jax_"


@dataclass
class Metrics:
    """Numbers since the start. Each is changed by one thread only."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def text(self, gauges: Mapping[str, Any]) -> str:
        """Return all numbers, and those of this moment by name.

        >>> print(Metrics(finished=2).text({"running": 1}).partition("# TYPE lora_jax_failed")[0])
        # TYPE lora_jax_finished_total counter
        lora_jax_finished_total 2
        <BLANKLINE>
        """
        counters = [(f"{x.name}_total", "counter", getattr(self, x.name)) for x in fields(self)]
        shown = [*counters, *((name, "gauge", value) for name, value in gauges.items())]
        lines = [
            f"# TYPE {PREFIX}{name} {kind}\n{PREFIX}{name} {value}\n" for name, kind, value in shown
        ]
        return "".join(lines)
