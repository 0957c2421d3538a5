"""Files that are written one tensor after the other: the bytes of the format's own library."""

import io

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from lora_jax.core.errors import AdapterFileError
from lora_jax.files.disk import safetensors_file
from lora_jax.files.disk.atomic import write_directory
from lora_jax.files.disk.safetensors_stream import InMemory, SafetensorsStream, to_bytes

DTYPES = ("float32", "float16", ml_dtypes.bfloat16, "float64", "int64", "int32", "uint8", "bool")


class Rows:
    """A tensor that yields a row at a time, and may lie about itself."""

    def __init__(self, values, shape=None, dtype=None):
        self.values = values
        self.shape, self.dtype = shape or values.shape, np.dtype(dtype or values.dtype)

    def blocks(self):
        yield from self.values


def tensors():
    rng = np.random.default_rng(0)
    found = {f"b.{np.dtype(d)}": (rng.normal(size=(3, 5)) * 9).astype(d) for d in DTYPES}
    return found | {"a": np.asarray(2.0, "f"), "é": np.zeros((0, 3), "f")}


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}])
def test_bytes_are_those_of_safetensors(metadata):
    values = tensors()
    lazy = {name: Rows(x) if x.ndim else InMemory(x) for name, x in values.items()}
    assert to_bytes(SafetensorsStream(lazy, metadata)) == save(values, metadata or None)


def test_transposed_blocks_are_written_in_their_order():
    x = np.arange(12.0).reshape(3, 4).T
    assert x.T.flags.c_contiguous
    found, _ = safetensors_file.decode(to_bytes(SafetensorsStream({"x": InMemory(x)}, {})), "x")
    np.testing.assert_array_equal(found["x"], x)


@pytest.mark.parametrize(
    "tensor, message",
    [
        (Rows(np.ones((2, 3)), (3, 3)), "x has 48 bytes, not 72"),
        (Rows(np.ones((2, 3), "f"), dtype="float64"), "x is float32, not float64"),
        (Rows(np.ones((2, 3), ml_dtypes.float8_e4m3b11fnuz)), "does not support the dtype"),
    ],
)
def test_a_tensor_that_is_not_what_it_says_leaves_nothing(tensor, message, tmp_path):
    stream = SafetensorsStream({"x": tensor}, {}, "a.safetensors")
    with pytest.raises(AdapterFileError, match=message):
        stream(io.BytesIO())
    for place in (tmp_path / "new", tmp_path):
        with pytest.raises(AdapterFileError, match=message):
            write_directory(place, {"config.json": b"{}", "a.safetensors": stream})
    assert list(tmp_path.iterdir()) == []
