"""Directories of Hugging Face's `datasets` (5.2.0, recorded by record_datasets.py), and Arrow."""

import pathlib
import shutil

import pytest

pytest.importorskip("pyarrow")

import pyarrow

from lora_jax.training.dataset import read_rows
from lora_jax.training.errors import DataError
from lora_jax.training.rows.arrow import HELD_OUT, TRAINING
from lora_jax.training.rows.fields import Fields
from lora_jax.training.streaming.files import divide_directory, find_files
from lora_jax.training.streaming.pieces import divide, read_piece
from tests.training.rows.record_datasets import ROWS

DICT = pathlib.Path(__file__).parent / "recorded" / "dict"
FIELDS = Fields.parse(["prompt=question", "completion=answer"])
LABELS = Fields.parse(["text=question", "label=stars"])


def values(rows):
    return [dict(row.values) for row in rows]


def test_the_splits_of_a_dict():
    names = lambda files: [str(file.relative_to(DICT)) for file in files]
    shards = [f"train/data-0000{n}-of-00002.arrow" for n in range(2)]
    assert names(find_files([DICT])) == shards == names(find_files([DICT / "train"]))
    assert names(find_files([DICT], HELD_OUT)) == ["validation/data-00000-of-00001.arrow"]
    assert names(find_files([DICT / "test"], TRAINING)) == ["test/data-00000-of-00001.arrow"]


def test_all_rows_in_their_order():
    """The recorded order is the reverse."""
    wanted = [{"prompt": row["question"], "completion": row["answer"]} for row in ROWS["train"]]
    found = [
        row for file in find_files([DICT]) for row in values(read_rows(file, fields=FIELDS).rows)
    ]
    assert found == wanted[::-1]
    (held_out,) = find_files([DICT], HELD_OUT)
    rows = read_rows(held_out, fields=LABELS)
    assert (rows.kind, rows.ignored) == ("label", ("answer",))
    assert values(rows.rows) == [{"text": "Held?", "label": 1}]
    with pytest.raises(DataError, match="row 1: completion is a JSON null, not a string"):
        read_rows(DICT / "test" / "data-00000-of-00001.arrow", fields=FIELDS)


def test_pieces_have_all_rows():
    (first, _) = find_files([DICT])
    pieces = divide([first], size=30, fields=FIELDS)
    assert len(pieces) == 4
    found = [read_piece(piece, "utf-8", fields=FIELDS) for piece in pieces]
    whole = values(read_rows(first, fields=FIELDS).rows)
    assert [x for rows in found for x in values(rows.rows)] == whole
    assert [place for rows in found for place in rows.places] == [f"row {n}" for n in range(1, 5)]


def test_files_of_arrow_itself(tmp_path):
    """Both of its formats, for streams and for files."""
    table = pyarrow.table({"text": ["a", "b"]})
    for kind, new in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        path = tmp_path / f"{kind}.arrow"
        with new(str(path), table.schema) as writer:
            writer.write_table(table)
        assert values(read_rows(path).rows) == [{"text": "a"}, {"text": "b"}]
    assert find_files([tmp_path]) == [tmp_path / "file.arrow", tmp_path / "stream.arrow"]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("train/state.json", "{}", "state.json: is damaged: _data_files is not a list"),
        ("train/state.json", '{"_data_files": [{"filename": "../x"}]}', "does not name files"),
        ("train/state.json", '{"_data_files": []}', "does not name files"),
        ("train/state.json", "{", "state.json"),
        ("dataset_dict.json", '{"splits": ["a", "b"]}', "has no split train, but a, b; name one"),
        ("dataset_dict.json", "[]", "dataset_dict.json: is damaged: splits is not a list"),
        ("dataset_dict.json", '{"splits": ["train", "x"]}', None),
    ],
)
def test_damaged_directories(name, content, error, tmp_path):
    folder = tmp_path / "dict"
    shutil.copytree(DICT, folder)
    (folder / name).write_text(content)
    if error is None:
        assert len(find_files([folder])) == 2
        return
    with pytest.raises(DataError, match=error) as raised:
        find_files([folder])
    assert str(folder) in str(raised.value)


def test_damaged_and_missing_files(tmp_path, monkeypatch):
    path = tmp_path / "d.arrow"
    path.write_bytes(b"not arrow")
    with pytest.raises(DataError, match=r"d\.arrow: cannot be read as Arrow"):
        read_rows(path)
    with pytest.raises(DataError, match=r"cannot read .*none\.arrow: No such file"):
        read_rows(tmp_path / "none.arrow")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    path.write_bytes(b"other")
    with pytest.raises(DataError, match=r"reading Arrow needs the package pyarrow; pip install"):
        read_rows(path)


def test_splits_by_the_names_of_files(tmp_path):
    """As mlx-lm names them, and as the Hub does; without a training split all files are taken."""
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "notes.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    names = lambda *given: [str(x.relative_to(tmp_path)) for x in find_files([tmp_path], *given)]
    assert names() == ["notes.jsonl", "train.jsonl"] and names(HELD_OUT) == ["valid.jsonl"]
    (tmp_path / "data").mkdir()
    for n in range(2):
        (tmp_path / "data" / f"train-0000{n}-of-00002.parquet").write_text("")
    shards = [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    assert names() == [*shards, "notes.jsonl", "train.jsonl"]
    others = divide_directory(tmp_path, TRAINING)[1]
    assert [file.name for file in others] == ["test.jsonl", "valid.jsonl"]
    (tmp_path / "valid.jsonl").rename(tmp_path / "trained.jsonl")
    assert names(HELD_OUT) == ["test.jsonl"]
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(DataError, match="has files of train, but none of validation; name a file"):
        find_files([tmp_path], HELD_OUT)
    (tmp_path / "train.jsonl").unlink()
    for file in (tmp_path / "data").iterdir():
        file.unlink()
    assert names() == names(HELD_OUT) == ["notes.jsonl", "trained.jsonl"]


def test_a_damaged_name_of_a_column(tmp_path):
    path = tmp_path / "d.arrow"
    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"text", b"tex\xec"))
    for read in (read_rows, lambda path: divide([path], 10)):
        with pytest.raises(DataError, match=r"d\.arrow: cannot be read as Arrow"):
            read(path)
