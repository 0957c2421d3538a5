"""What an adapted model remembers of `wrap` and `join` for each call."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.engine.custom_rules import Rule
from lora_jax.engine.transform import lora


@dataclasses.dataclass(frozen=True)
class Options:
    """The function that a call runs, and how; equal ones let a compiled step be used again.

    Attributes:
      fn: a function `fn(model, *args, **kwargs)`.
      on_dense: what to do where a weight must be materialized, as for `lora`.
      rules: what custom primitives do with weights, as for `lora`.
    """

    fn: Callable[..., Any]
    on_dense: str
    rules: Mapping[str, Rule] | None = dataclasses.field(hash=False)

    def adapt(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that accepts adapted parameters."""
        return lora(fn, on_dense=self.on_dense, rules=self.rules)


def call_model(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a model: the function that `wrap` adapts unless another is given."""
    return model(*args, **kwargs)
