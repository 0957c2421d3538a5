"""Write GGUF, llama.cpp's file format, version 3: metadata and tensors of floating numbers.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np

#: ggml's number of each dtype that can be written.
DTYPES = {
    np.dtype("float32"): 0,
    np.dtype("float16"): 1,
    np.dtype(ml_dtypes.bfloat16): 30,
}
_ALIGNMENT = 32
_UINT32, _FLOAT32, _STRING = 4, 6, 8

#: A value of metadata: a string, an unsigned integer of 32 bits, or a float, stored as float32.
Value = str | int | float


def encode(metadata: Mapping[str, Value], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the bytes of a GGUF file.

    Args:
      metadata: by key.
      tensors: by name, of a dtype in `DTYPES`, their axes in NumPy's order.

    >>> data = encode({"general.type": "adapter"}, {"a": np.ones((2, 3), "float16")})
    >>> data[:4], len(data) % 32
    (b'GGUF', 0)
    """
    arrays = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    header, offset = [], 0
    for name, x in arrays.items():
        axes = struct.pack(f"<I{x.ndim}Q", x.ndim, *x.shape[::-1])
        header.append(_string(name) + axes + struct.pack("<IQ", DTYPES[x.dtype], offset))
        offset += _padded(x.nbytes)
    pairs = [_string(key) + _value(value) for key, value in metadata.items()]
    counts = struct.pack("<IQQ", 3, len(arrays), len(pairs))
    start = b"".join([b"GGUF", counts, *pairs, *header])
    parts = [start, b"\0" * (_padded(len(start)) - len(start))]
    for x in arrays.values():
        parts += [x.tobytes(), b"\0" * (_padded(x.nbytes) - x.nbytes)]
    return b"".join(parts)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<If", _FLOAT32, value)
