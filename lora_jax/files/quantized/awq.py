"""AWQ's files of version "gemm": `qweight` packed along the outputs, `qzeros` and `scales`.

As AutoAWQ 0.2.9 writes them (`awq/modules/linear/gemm.py`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import ModelFileError
from lora_jax.core.foreign import shown, shown_value
from lora_jax.files.quantized.groups import regular
from lora_jax.files.quantized.integers import stored_integers
from lora_jax.files.quantized.packing import WORD, unpack_words
from lora_jax.files.quantized.stored import LazyArray, StoredCodes, part, replace_parts

_BITS = 4
_PER_WORD = WORD // _BITS
#: Which of eight neighbouring outputs has the lowest four bits of a word, the next four, ...
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PARTS = (".qweight", ".qzeros", ".scales")


def read(tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Return the tensors of a file, with one `StoredCodes` in the place of each weight's parts."""
    bits = config.get("bits", config.get("w_bit", _BITS))
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if bits != _BITS or version != "gemm":
        raise ModelFileError(
            f"AWQ: version {shown_value(version)} of {shown_value(bits)} bits cannot be read, only "
            '"gemm" of 4 bits; save the model in that one'
        )
    make = lambda module: _weight(tensors, module, dtype)
    return replace_parts(tensors, _PARTS, ".weight", make)


def _weight(tensors: Mapping[str, Any], module: str, dtype: Any) -> StoredCodes:
    words = part(tensors, f"{module}.qweight", (-1, -1), "int32")
    size, out = words.shape[0], words.shape[1] * _PER_WORD
    scales = part(tensors, f"{module}.scales", (-1, out), "float16 bfloat16 float32")
    count = scales.shape[0]
    zeros = part(tensors, f"{module}.qzeros", (count, words.shape[1]), "int32")
    if not count or size % count:
        raise ModelFileError(f"{shown(module)}.scales: {count} groups do not divide {size} inputs")
    return stored_integers(
        f"{module}.weight",
        LazyArray((out, size), np.dtype(np.uint8), lambda: _outputs(words)),
        LazyArray((out, count), scales.dtype, lambda: np.asarray(scales).T),
        LazyArray((out, count), np.dtype(np.uint8), lambda: _outputs(zeros)),
        _BITS,
        lambda: regular(size, size // count),
        dtype or scales.dtype,
    )


def _outputs(words: Any) -> np.ndarray:
    """Return the codes `[out, n]` of words `[n, out / 8]`."""
    codes = unpack_words(np.asarray(words), _BITS)
    eights = codes.reshape(codes.shape[0], -1, _PER_WORD)
    found = np.empty_like(eights)
    found[..., _ORDER] = eights
    return found.reshape(codes.shape).T
