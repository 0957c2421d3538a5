"""The table of kinds of quantized numbers."""

from lora_jax.core.errors import ConfigError
from lora_jax.core.quantized.integers import INT4, INT8, INT8_BLOCK
from lora_jax.core.quantized.kind import Kind
from lora_jax.core.quantized.nf4 import NF4

#: Every kind by name.
KINDS: dict[str, Kind] = {kind.name: kind for kind in (NF4, INT8, INT8_BLOCK, INT4)}


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
