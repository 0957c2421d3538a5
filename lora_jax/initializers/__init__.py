"""Initializers of A and B, by the names that `LoraConfig(init=...)` takes.

An initializer is a function `(key, w, layout, rank, scale, dtype) -> (w', a, b)`, and your own goes
into `LoraConfig(init=my_initializer)`:

- `key`: a random key of this weight alone.
- `w`: the weight, an array of any floating dtype. It is a tracer if `init` runs under `jax.jit` or
  on `ShapeDtypeStruct`s, so use `jax.numpy` and do not branch on its values.
- `layout`: its `Layout`. `layout.a_shape(w.shape, rank)` is the shape of A, `[*batch, *in, rank]`,
  and `layout.b_shape(w.shape, rank)` that of B, `[*batch, rank, *out]`.
- `rank`, `scale`: an int and a float. The adapted weight means `w' + scale * A @ B`.
- `dtype`: the dtype of A and B.
- `w'`: the base weight to keep: `w` itself, or an array of its shape and dtype.

>>> import jax, jax.numpy as jnp, lora_jax
>>> def ones(key, w, layout, rank, scale, dtype):
...     a = jnp.ones(layout.a_shape(w.shape, rank), dtype)
...     return w, a, jnp.zeros(layout.b_shape(w.shape, rank), dtype)
>>> config = lora_jax.LoraConfig(rank=2, init=ones)
>>> params = lora_jax.init(jax.random.key(0), {"kernel": jnp.ones((4, 3))}, config)
>>> params["kernel"].a[0]
Array([1., 1.], dtype=float32)

`lora_jax.eva` and `lora_jax.lora_ga` also compute initial values, from example batches. They run
after `init`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from lora_jax.initializers.quantized import loftq
from lora_jax.initializers.sampled import gaussian, kaiming, orthogonal
from lora_jax.initializers.signature import Initializer, InitialValues
from lora_jax.initializers.spectral import olora, pissa, pissa_fast

INITIALIZERS: Mapping[str, Initializer] = MappingProxyType(
    {
        "kaiming": kaiming,
        "gaussian": gaussian,
        "orthogonal": orthogonal,
        "pissa": pissa,
        "pissa_fast": pissa_fast,
        "olora": olora,
        "loftq": loftq(),
    }
)

__all__ = [
    "INITIALIZERS",
    "InitialValues",
    "Initializer",
    "gaussian",
    "kaiming",
    "loftq",
    "olora",
    "orthogonal",
    "pissa",
    "pissa_fast",
]
