"""Compressed data has the rows of the plain file."""

import bz2
import gzip
import sys

import pytest

from lora_jax.training.dataset import read_rows
from lora_jax.training.errors import DataError
from lora_jax.training.streaming.files import find_files
from lora_jax.training.streaming.pieces import divide

CONTENT = {
    "d.jsonl": '{"text": "é"}\n{"text": "b"}\n',
    "d.json": '[{"text": "é"}, {"text": "b"}]',
    "d.csv": "text,label\né,1\nb,2\n",
    "d.txt": "é and b\n",
}


def zstd(data):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", CONTENT)
def test_the_rows_are_those_of_the_plain_file(name, suffix, tmp_path):
    plain, packed = tmp_path / name, tmp_path / f"{name}{suffix}"
    plain.write_text(CONTENT[name])
    data = plain.read_bytes()
    packed.write_bytes(gzip.compress(data) if suffix == ".gz" else zstd(data))
    one, other = read_rows(plain), read_rows(packed)
    assert (one.kind, one.rows, one.unit) == (other.kind, other.rows, other.unit)
    plain.unlink()
    assert find_files([tmp_path]) == [packed]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_files(suffix, tmp_path):
    path = tmp_path / f"d.jsonl{suffix}"
    data = CONTENT["d.jsonl"].encode() * 99
    whole = gzip.compress(data) if suffix == ".gz" else zstd(data)
    for broken in (b"", bz2.compress(data), whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(broken)
        with pytest.raises(
            DataError, match=rf"d\.jsonl\{suffix}: (is not a whole|the file is empt)"
        ):
            read_rows(path)


def test_what_is_refused(tmp_path, monkeypatch):
    (tmp_path / "d.parquet.gz").write_bytes(b"")
    for reads in (read_rows, lambda path: divide([path], 10)):
        with pytest.raises(DataError, match=r"d\.parquet\.gz: unknown file type"):
            reads(tmp_path / "d.parquet.gz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"reading \.zst needs the package pyarrow"):
        read_rows(tmp_path / "d.jsonl.zst")
