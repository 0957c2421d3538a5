"""Starting values of A and B, by the names of `LoraConfig(init=...)`; each is a `Start`."""

from collections.abc import Mapping
from types import MappingProxyType

from lora_jax.initializers.quantized import loftq
from lora_jax.initializers.sampled import gaussian, kaiming, orthogonal
from lora_jax.initializers.signature import Factors, Start
from lora_jax.initializers.spectral import olora, pissa, pissa_fast

STARTS: Mapping[str, Start] = MappingProxyType(
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
    "STARTS",
    "Factors",
    "Start",
    "gaussian",
    "kaiming",
    "loftq",
    "olora",
    "orthogonal",
    "pissa",
    "pissa_fast",
]
