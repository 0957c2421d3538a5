"""Layers made together with their adapters, as pure functions and as Flax Linen modules.

    from lora_jax import layers

`low_rank`, `linear` and `embedding` each have `init(key, ...)` and `apply(params, x, ...)`. `Lora`,
`LinearWithLoRA` and `Embedding` are the same as modules. The kernel or table of the latter two is a
`LoraWeight`, so all of `lora_jax` works on their parameters. `looked_up`, `take_rows` and
`put_rows` train an embedding by the rows that a batch looks up.

To adapt an existing model, use `lora_jax.init` and `lora_jax.lora`; they need none of these layers.
"""

from lora_jax.layers import embedding, linear, low_rank
from lora_jax.layers.modules import Embedding, LinearWithLoRA, Lora
from lora_jax.layers.sparse_rows import looked_up, put_rows, take_rows

__all__ = [
    "Embedding",
    "LinearWithLoRA",
    "Lora",
    "embedding",
    "linear",
    "looked_up",
    "low_rank",
    "put_rows",
    "take_rows",
]
