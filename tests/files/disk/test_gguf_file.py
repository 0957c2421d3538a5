"""GGUF files against the package `gguf`, which writes them here and reads them beside ours."""

import random

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize

from lora_jax.core.errors import ModelFileError
from lora_jax.files.disk import gguf_file

KINDS = (
    *(Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0),
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
)


def stored(kind: Kind) -> np.ndarray:
    """Return three rows of stored numbers; K-quants, which `gguf` cannot write, from bytes."""
    rng = np.random.default_rng(int(kind))
    if not kind.name.endswith("_K"):
        return quantize(rng.normal(size=(3, 512)).astype("float32"), kind)
    shape = quant_shape_to_byte_shape((3, 512), kind)
    return rng.integers(0, 60, shape, "uint8")  # no exponent of float16's infinities


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small file with a tensor of every kind and metadata of every type."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.epsilon", 0.5)
    writer.add_bool("llama.flag", True)
    writer.add_int64("llama.low", -(2**40))
    writer.add_string("llama.note", "naïve")
    writer.add_array("llama.words", ["a", "", "日本"])
    writer.add_array("llama.numbers", [1, -2, 3])
    for kind in KINDS:
        writer.add_tensor(kind.name, stored(kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata(path):
    metadata = dict(gguf_file.read(path).metadata)
    np.testing.assert_array_equal(metadata.pop("llama.numbers"), [1, -2, 3])
    assert metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.epsilon": 0.5,
        "llama.flag": True,
        "llama.low": -(2**40),
        "llama.note": "naïve",
        "llama.words": ["a", "", "日本"],
    }


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_tensors(path, kind):
    tensor = gguf_file.read(path).tensors[kind.name]
    (theirs,) = [t for t in GGUFReader(path).tensors if t.name == kind.name]
    assert tensor.shape == (3, 512) and tensor.kind == kind.name
    values = np.asarray(tensor)
    assert values.shape == (3, 512) and values.dtype == np.float32
    np.testing.assert_array_equal(values, dequantize(np.array(theirs.data), kind).reshape(3, 512))


def test_a_tensor_becomes_what_it_is_asked_for(path):
    assert np.asarray(gguf_file.read(path).tensors["Q8_0"], "float16").dtype == np.float16


def read_all(path) -> None:
    for tensor in gguf_file.read(path).tensors.values():
        np.asarray(tensor)


def test_every_cut_is_told(path, tmp_path):
    data, cut = path.read_bytes(), tmp_path / "cut.gguf"
    end = max(t.data_offset + t.n_bytes for t in GGUFReader(path).tensors)
    rng = random.Random(0)
    for size in [0, 1, 4, 8, 23, 24, end - 1, *(rng.randrange(end) for _ in range(60))]:
        cut.write_bytes(data[:size])
        with pytest.raises(ModelFileError, match=r"cut\.gguf: (the file is empty|not a comp)"):
            read_all(cut)


def test_mutations_are_read_or_told(path, tmp_path):
    data, changed = path.read_bytes(), tmp_path / "changed.gguf"
    header = min(t.data_offset for t in GGUFReader(path).tensors)
    rng, told = random.Random(0), 0
    for i in range(1000):
        mutant = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(header if i % 4 else len(data))
            mutant[at] = rng.choice([0, 1, 127, 255, mutant[at] ^ (1 << rng.randrange(8))])
        changed.write_bytes(mutant)
        try:
            read_all(changed)
        except ModelFileError:
            told += 1
    assert told > 500


def test_other_files(tmp_path):
    def told(data: bytes) -> str:
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(ModelFileError) as caught:
            gguf_file.read(tmp_path / "x.gguf")
        return str(caught.value).partition(": ")[2]

    head = b"GGUF\3\0\0\0"
    one, two = (n.to_bytes(8, "little") for n in (1, 2))
    key = one + b"k"
    assert told(b"PK\3\4 and more") == "not a complete GGUF file: it starts with b'PK\\x03\\x04'"
    assert "version 50331648" in told(b"GGUF\0\0\0\3" + bytes(16))
    assert "the key k appears twice" in told(head + bytes(8) + two + 2 * (key + b"\7\0\0\0\1"))
    assert "unknown type 13" in told(head + bytes(8) + one + key + b"\x0d\0\0\0")
    nested = head + bytes(8) + one + key + b"\x09\0\0\0\x09\0\0\0" + one
    assert "an array of 1 values of type 9" in told(nested)
    huge = head + bytes(8) + one + key + b"\x09\0\0\0\x04\0\0\0" + b"\xff" * 7 + b"\0"
    assert "exceed the file" in told(huge)
    with pytest.raises(FileNotFoundError):
        gguf_file.read(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("offsets", "message"),
    [((0, 0), "overlap"), ((0, 1 << 40), "exceed the file"), ((64, 0), None)],
)
def test_where_tensors_lie(tmp_path, offsets, message):
    path = tmp_path / "x.gguf"
    tensor = lambda name, at: (
        (1).to_bytes(8, "little") + name + (1).to_bytes(4, "little") + (4).to_bytes(8, "little")
        + bytes(4) + at.to_bytes(8, "little")
    )  # fmt: skip
    header = b"GGUF\3\0\0\0" + (2).to_bytes(8, "little") + bytes(8)
    header += b"".join(map(tensor, (b"a", b"b"), offsets))
    path.write_bytes(header + bytes(-len(header) % 32) + bytes(80))
    if message is None:
        assert gguf_file.read(path).tensors.keys() == {"a", "b"}
    else:
        with pytest.raises(ModelFileError, match=message):
            gguf_file.read(path)


def test_numbers_that_are_none(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", np.array([1, np.nan], "float32"))
    writer.add_tensor("b", np.array([1, 2], "int32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = gguf_file.read(tmp_path / "x.gguf").tensors
    with pytest.raises(ModelFileError, match="a: contains NaN or infinite values"):
        np.asarray(tensors["a"])
    with pytest.raises(ModelFileError, match="b: type I32 is not supported"):
        np.asarray(tensors["b"])
