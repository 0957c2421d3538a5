"""Safetensors files: what the library writes is read; anything else is rejected clearly."""

import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from lora_jax import AdapterFileError
from lora_jax.files.disk import safetensors_file, strict_json

TENSORS = {
    "matrix.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.array([1.5, -2], np.float16),
    "brain": np.array([[1.5], [-2]], ml_dtypes.bfloat16),
    "scalar": np.float32(3.0),
    "none": np.zeros((0, 3), np.int32),
    "flags": np.array([True, False]),
    **{t: np.arange(3).astype(t) for t in ("i1", "u1", "i2", "u2", "u4", "i8", "u8", "f8", "c8")},
    "eight": np.array([1, 2, 3], ml_dtypes.float8_e4m3fn),
    "five": np.array([1, 2, 3], ml_dtypes.float8_e5m2),
}
TENSORS = {name: np.asarray(x) for name, x in TENSORS.items()}
KNOWN = {n: x for n, x in TENSORS.items() if n not in ("eight", "five")}  # to the library's numpy


def record(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def raw(header, data=b"\0" * 8):
    """Return a file's bytes from its header, given as a value or as text."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def same(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype and got[name].shape == x.shape, name
        assert got[name].tobytes() == x.tobytes(), name


def test_what_the_library_writes_is_read(tmp_path):
    save_file(KNOWN, tmp_path / "a", {"format": "pt"})
    tensors, metadata = safetensors_file.read(tmp_path / "a", finite=True)
    same(tensors, KNOWN)
    assert metadata == {"format": "pt"}


def test_what_is_written_the_library_reads(tmp_path):
    views = {**TENSORS, "strided": np.arange(12.0).reshape(3, 4).T[::2]}
    safetensors_file.write(tmp_path / "a", views, {"who": "me"})
    same(safetensors_file.read(tmp_path / "a", finite=True)[0], views)
    same(safetensors_file.decode((tmp_path / "a").read_bytes(), "a")[0], views)
    with safetensors.safe_open(tmp_path / "a", framework="np") as file:
        assert file.metadata() == {"who": "me"} and set(file.keys()) == views.keys()
        same({n: file.get_tensor(n) for n in KNOWN}, {n: views[n] for n in KNOWN})


def test_headers_alone(tmp_path):
    safetensors_file.write(tmp_path / "a", TENSORS, {"who": "me"})
    header = safetensors_file.headers(tmp_path / "a")
    assert header.metadata == {"who": "me"} and header.tensors.keys() == TENSORS.keys()
    info = header.tensors["brain"]
    assert info.dtype == ml_dtypes.bfloat16 and info.shape == (2, 1)


def test_an_empty_file_of_tensors(tmp_path):
    safetensors_file.write(tmp_path / "a", {})
    assert safetensors_file.read(tmp_path / "a") == ({}, {})


HOSTILE = {
    "nothing": (b"", "it has 0 bytes"),
    "nine bytes": (b"\2" + b"\0" * 7 + b"{", "it has 9 bytes|header should have"),
    "text": (b"hello, this is a text", "does not start with"),
    "header beyond the file": (raw({})[:-9], "header should have"),
    "length of 2**63": (b"\xff" * 8 + b"{}", "header should have"),
    "not JSON": (raw(b"{'a': 1}"), "not valid JSON"),
    "a list": (raw(b"[1, 2, 3]"), "does not start with"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (raw('{"a": 1}'.encode("utf-16")), "does not start with"),
    "deep": (raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "too deeply"),
    "long number": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "constant": (raw(b'{"a": NaN}'), "NaN is not a JSON number"),
    "half a character": (raw(b'{"\\ud800": 1}'), "not valid JSON"),
    "twice": (raw(b'{"a": {}, "a": {}}'), "'a' appears twice"),
    "twice within": (
        raw(b'{"a": {"dtype": "F32", "dtype": "F32"}}'),
        "'dtype' appears twice",
    ),
    "a number": (raw({"a": 3}), "tensor 'a': must have dtype"),
    "missing field": (raw({"a": {"dtype": "F32", "shape": [2]}}), "tensor 'a': must have dtype"),
    "surplus field": (raw({"a": record() | {"x": 1}}), "tensor 'a': must have dtype"),
    "unknown dtype": (raw({"a": record(dtype="F31")}), "tensor 'a': unknown dtype 'F31'"),
    "dtype a list": (raw({"a": record(dtype=["F32"])}), "tensor 'a': unknown dtype"),
    "shape a number": (raw({"a": record() | {"shape": 2}}), "tensor 'a': shape 2 is not a list"),
    "shape negative": (raw({"a": record((-1, -2))}), "tensor 'a': shape"),
    "shape bool": (raw({"a": record((True, 2))}), "tensor 'a': shape"),
    "shape float": (raw({"a": record((2.0,))}), "tensor 'a': shape"),
    "shape huge": (raw({"a": record((2**62, 2**62))}), "tensor 'a': shape .* any memory"),
    "shape huge and none": (
        raw({"a": record((0, 2**62, 8), (0, 0))}, b""),
        "tensor 'a': shape .* any memory",
    ),
    "many axes": (raw({"a": record([1] * 40)}), "tensor 'a': shape"),
    "wrong size": (raw({"a": record((3,))}), "tensor 'a': F32 .* needs 12 bytes, but has 8"),
    "offsets three": (raw({"a": record(offsets=(0, 4, 8))}), "tensor 'a': data_offsets"),
    "offsets backward": (raw({"a": record(offsets=(8, 0))}), "tensor 'a': data_offsets"),
    "offsets negative": (raw({"a": record(offsets=(-8, 0))}), "tensor 'a': data_offsets"),
    "offsets bool": (raw({"a": record((0,), (False, False))}), "tensor 'a': data_offsets"),
    "beyond the data": (raw({"a": record((4,), (0, 16))}), "need 16 bytes, but the file"),
    "gap before": (raw({"a": record((1,), (4, 8))}), "tensor 'a': leaves a gap"),
    "overlap": (raw({"a": record(), "b": record((1,), (4, 8))}), "tensor 'b': overlaps"),
    "trailing bytes": (raw({"a": record((1,), (0, 4))}), "need 4 bytes, but the file contains 8"),
    "metadata a list": (raw({"__metadata__": []}, b""), "metadata must be a mapping"),
    "metadata a number": (raw({"__metadata__": {"a": 1}}, b""), "metadata 'a' must be a string"),
    "bool of 7": (raw({"a": record((8,), dtype="BOOL")}, b"\7" * 8), "tensor 'a' has bools"),
    **{
        f"name {name!r:.20}": (raw({name: record()}), "tensor .*: a name")
        for name in (
            *("../a", "a/../b", "a\\..\\b", "/etc/passwd", "\\\\host\\a", "C:\\a", "a\0b", "a\nb"),
            *("\x1b[31m", "x" * 5000, ""),
        )
    },
    "zip": (b"PK\3\4" + b"\0" * 100, "a PyTorch pickle.*convert it to safetensors"),
    "pickle": (pickle.dumps({"a": list(range(100))}), "a PyTorch pickle"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\0" * 30, "a GGUF file"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "git lfs pull"),
    "page": (b"<!DOCTYPE html><html>", "a web page"),
}


@pytest.mark.parametrize("data, match", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path, data, match):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(data)
    for read in (safetensors_file.read, safetensors_file.headers)[: 1 if "bools" in match else 2]:
        with pytest.raises(AdapterFileError, match=rf"(?s)adapter\.safetensors: .*({match})") as e:
            read(path)
        assert len(str(e.value)) < 3000 and str(e.value).replace("\n", "").isprintable()
    assert os.listdir(tmp_path) == [path.name]


def test_the_library_agrees_or_is_less_strict(tmp_path):
    """We accept nothing that the library rejects."""
    for name, (data, _) in HOSTILE.items():
        (tmp_path / "a").write_bytes(data)
        try:
            load_file(tmp_path / "a")
        except Exception:
            with pytest.raises(AdapterFileError):
                safetensors_file.read(tmp_path / "a")
        else:
            assert name.startswith(("name", "surplus", "bool", "twice", "shape huge and"))


def test_a_huge_header_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", 1000)
    (tmp_path / "a").write_bytes(raw({"__metadata__": {"a": "x" * 2000}}, b""))
    with pytest.raises(AdapterFileError, match="the header has 2,"):
        safetensors_file.read(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="the header would exceed"):
        safetensors_file.write(tmp_path / "b", {}, {"a": "x" * 2000})
    assert os.listdir(tmp_path) == ["a"]


def test_all_problems_in_one_message(tmp_path):
    kinds = [x + y for x in "abcdefghijklmno" for y in "abcdefghijklmn"]
    header = {f"t{i}": record(dtype=kind) for i, kind in enumerate(kinds)}
    (tmp_path / "a").write_bytes(raw(header))
    with pytest.raises(AdapterFileError) as error:
        safetensors_file.read(tmp_path / "a")
    lines = str(error.value).splitlines()
    assert len(lines) == 202 and "tensor 't199'" in lines[200] and lines[201] == "and 10 more"


def test_problems_of_one_kind_are_one_line(tmp_path):
    (tmp_path / "a").write_bytes(raw({f"t{i}": record(dtype="?") for i in range(210)}))
    with pytest.raises(AdapterFileError, match="207 more") as error:
        safetensors_file.read(tmp_path / "a")
    _, line = str(error.value).splitlines()
    assert line.startswith("210 tensors (tensor 't0', ") and line.endswith("unknown dtype '?'")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "bfloat16", "float8_e5m2"])
def test_values_that_are_not_finite_are_all_named(tmp_path, dtype):
    tensors = {
        "good": np.ones(3, dtype),
        "nan": np.array([1, np.nan], dtype),
        "inf": np.array([1, -np.inf], dtype),
        "int": np.ones(3, np.int32),
    }
    safetensors_file.write(tmp_path / "a", tensors)
    same(safetensors_file.read(tmp_path / "a")[0], tensors)
    with pytest.raises(AdapterFileError, match=r"(?s)NaN or infinite") as error:
        safetensors_file.read(tmp_path / "a", finite=True)
    assert sorted(str(error.value).splitlines()[1:]) == ["'inf'", "'nan'"]


def test_things_that_are_no_files(tmp_path):
    with pytest.raises(AdapterFileError, match="no such file"):
        safetensors_file.read(tmp_path / "none")
    with pytest.raises(AdapterFileError, match="not a file"):
        safetensors_file.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(AdapterFileError, match="not a file"):
        safetensors_file.read(tmp_path / "pipe")


def test_write_refuses_what_could_not_be_read(tmp_path):
    x = np.zeros(2, np.float32)
    for tensors, metadata, match in (
        ({"../a": x}, None, "tensor '../a': a name must not lead"),
        (
            {"a": x.astype(ml_dtypes.int4)},
            None,
            "tensor 'a': safetensors does not support",
        ),
        ({"a": x}, {"b": 3}, "metadata 'b' must be a string"),
    ):
        with pytest.raises(AdapterFileError, match=match):
            safetensors_file.write(tmp_path / "a", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_strict_json():
    assert strict_json.parse_json(b'{"a": [1, 2.5, null, "\xc3\xa9"]}', "x") == {
        "a": [1, 2.5, None, "é"]
    }
    for text in ('{"a": 1, "a": 1}', "[NaN]", "[-Infinity]", '"\\udc00"', "", b"\xff", "[1,]"):
        with pytest.raises(AdapterFileError, match=r"^config: not valid JSON"):
            strict_json.parse_json(text, "config")
