"""`--field text=question`: the keys of rows under other names."""

import json

import pytest

from lora_jax.training.dataset import read_rows
from lora_jax.training.errors import DataError
from lora_jax.training.rows.fields import Fields
from lora_jax.training.streaming.pieces import divide, read_piece

ROWS = [{"q": f"q{n}", "a": f"a{n}", "text": "other", "n": n} for n in range(3)]


def write(path):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text(
            "".join(
                f"{x}\n" for x in ["q;a;text;n", *(";".join(map(str, r.values())) for r in ROWS)]
            )
        )
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_columns_stand_for_keys(suffix, tmp_path):
    path = write(tmp_path / f"d{suffix}")
    cases = {
        ("prompt=q", "completion=a"): [
            {"prompt": f"q{n}", "completion": f"a{n}"} for n in range(3)
        ],
        ("text=q", "label=n"): [{"text": f"q{n}", "label": n} for n in range(3)],
        ("text = a",): [{"text": f"a{n}"} for n in range(3)],
    }
    for texts, wanted in cases.items():
        fields = Fields.parse(texts)
        whole = read_rows(path, fields=fields)
        assert [dict(row.values) for row in whole.rows] == wanted
        pieces = [read_piece(p, "utf-8", fields=fields) for p in divide([path], 9, fields=fields)]
        assert [dict(row.values) for rows in pieces for row in rows.rows] == wanted
        assert "text" not in whole.ignored or texts[0].startswith("prompt")


def test_optional_keys_may_be_missing():
    fields = Fields.parse(["instruction=q", "output=a", "input=context", "messages=turns"])
    row = {"q": "Sing", "a": "la", "turns": 1}
    assert fields.rename(row) == {"instruction": "Sing", "output": "la", "messages": 1}
    with pytest.raises(ValueError, match="has no 'turns', which --field messages=turns names"):
        fields.rename({"q": "Sing", "a": "la"})
    assert fields.rename([1]) == [1] and Fields().rename(row) is row


def test_rows_without_the_column_are_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"q": "x"}\n{"other": "y"}\n')
    with pytest.raises(DataError, match="line 2: has no 'q', which --field text=q names"):
        read_rows(tmp_path / "d.jsonl", fields=Fields.parse(["text=q"]))


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (["text"], "--field text: write KEY=COLUMN, such as text=question"),
        (["text="], "write KEY=COLUMN"),
        (["frobnicate=text"], "'frobnicate' is not a key of rows; use"),
        (["mesages=turns"], "use messages on the left of ="),
        (["text=a", "text=b"], "text is read from a already"),
    ],
)
def test_what_is_refused(texts, error):
    with pytest.raises(DataError, match=error):
        Fields.parse(texts)
