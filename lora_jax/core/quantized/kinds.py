"""The table of kinds of quantized numbers."""

from lora_jax.core.errors import ConfigError
from lora_jax.core.quantized.fp8 import FP8, FP8_BLOCK
from lora_jax.core.quantized.gguf_blocks import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from lora_jax.core.quantized.integers import INT4, INT8, INT8_BLOCK
from lora_jax.core.quantized.k_quants import Q4_K, Q5_K, Q6_K
from lora_jax.core.quantized.kind import Kind
from lora_jax.core.quantized.mxfp4 import MXFP4
from lora_jax.core.quantized.nf4 import NF4
from lora_jax.core.quantized.nf4_nested import NF4_NESTED
from lora_jax.core.quantized.nvfp4 import NVFP4
from lora_jax.core.quantized.tables import FP4, NF4_FLOAT32
from lora_jax.core.quantized.zero_points import INT4_ZERO, INT8_ZERO

#: Every kind by name.
KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        *(NF4, NF4_FLOAT32, NF4_NESTED, FP4, MXFP4, NVFP4),
        *(INT8, INT8_BLOCK, INT8_ZERO, INT4, INT4_ZERO),
        *(FP8, FP8_BLOCK),
        *(Q8_0, Q4_0, Q4_1, Q5_0, Q5_1),
        *(Q4_K, Q5_K, Q6_K),
    )
}


class KindTable(dict[str, Kind]):
    """The kinds of quantized numbers, by the name that `quantize` takes.

    Each says its block, its source, and how many bits a number takes. Those whose `encode` is None
    come from files, and `quantize` cannot make them.

    >>> QUANTIZED_KINDS["nf4"].block, QUANTIZED_KINDS["nf4"].bits(4096)
    (64, 4.1328125)
    """


#: The same table, to read.
QUANTIZED_KINDS = KindTable(KINDS)

#: Those that `quantize` can make of floating numbers.
WRITABLE = tuple(name for name, kind in KINDS.items() if kind.encode is not None)


def kind_named(name: str) -> Kind:
    """Return the kind of this name.

    Raises:
      ConfigError: there is none.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"quantize: kind {name!r} is not one of {', '.join(KINDS)}")
    return KINDS[name]
