"""The one signature of all starts: what `LoraConfig(init=...)` calls for each adapted weight."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.core.weights import Layout

#: The base to keep (`w` itself where the start leaves it alone), A and B.
Factors = tuple[Any, jax.Array, jax.Array]

#: `start(key, w, layout, rank, scale, dtype) -> (w', a, b)`: `w` the weight, A
#: `[*batch, *in, rank]` and B `[*batch, rank, *out]` in `dtype`, `w'` of `w`'s shape and dtype.
#: Called on tracers where `init` is: for shapes without values, and under `jit`.
Start = Callable[[jax.Array, jax.Array, Layout, int, float, Any], Factors]
