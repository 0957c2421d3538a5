"""Into which files the weights of a model go, as transformers does it."""

import re
from collections.abc import Mapping

from lora_jax.core.checks import is_integer
from lora_jax.core.errors import ConfigError
from lora_jax.core.foreign import shown_value
from lora_jax.files.disk.safetensors_stream import Tensor, size_of

#: The largest file, by default.
MAX_SHARD_SIZE = "5GB"
_UNITS = {"": 1, **{f"{x}B": 1000**i for i, x in enumerate("KMGT", 1)}}
_UNITS |= {f"{x}IB": 1024**i for i, x in enumerate("KMGT", 1)}


def parse_size(size: int | str) -> int:
    """Return a number of bytes, from one or from a text such as "5GB", "500MB" or "2GiB".

    Raises:
      ConfigError: it is not a positive size.

    >>> parse_size("5GB"), parse_size("1GiB"), parse_size("1.5KB"), parse_size(10)
    (5000000000, 1073741824, 1500, 10)
    """
    number: float = 0
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]i?B)?", size.strip(), re.IGNORECASE)
        number = float(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    elif is_integer(size):
        number = size
    if number < 1:
        raise ConfigError(
            f"max_shard_size: {shown_value(size)} is not a size of a file, such as 5GB, 500MB or a "
            "number of bytes"
        )
    return int(number)


def split_into_files(tensors: Mapping[str, Tensor], largest: int) -> list[list[str]]:
    """Return the names in each file: in their order, a file begins when one would be too large.

    A tensor that is larger than a file may be is alone in one, as huggingface_hub's
    `split_torch_state_dict_into_shards` has it.
    """
    found: list[list[str]] = []
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        own = size_of(tensor)
        if own > largest:
            found.append([name])
            continue
        if names and size + own > largest:
            found.append(names)
            names, size = [], 0
        names.append(name)
        size += own
    return [*found, names] if names else found
