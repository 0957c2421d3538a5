"""Reading data files: what is read, and the message for each bad row."""

import json

import pytest

from lora_jax.training import dataset
from lora_jax.training.errors import DataError

GOOD = {
    "text": [{"text": "one"}, {"text": "two\u2028still two"}],
    "completion": [{"prompt": "1 + 1 =", "completion": " 2", "id": 7}],
    "chat": [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
    ],
    "label": [{"text": "good", "label": "pos"}, {"text": "bad", "label": "neg"}],
}


def write(path, lines, **how):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, **how) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("ascii", [True, False])
def test_every_kind(tmp_path, kind, ascii):
    path = write(tmp_path / "d.jsonl", ["", *GOOD[kind], " ", ""], ensure_ascii=ascii)
    found = dataset.read_rows(path)
    assert found.kind == kind and [row.line for row in found.rows] == list(
        range(2, 2 + len(GOOD[kind]))
    )
    keys = dataset.KEYS[kind]
    assert [row.values for row in found.rows] == [{k: r[k] for k in keys} for r in GOOD[kind]]
    assert found.ignored == (("id",) if kind == "completion" else ())


def test_windows_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "two"}\r\n')
    assert [row.values["text"] for row in dataset.read_rows(path).rows] == ["one", "two"]


def test_plain_text_is_one_row(tmp_path):
    path = tmp_path / "play.txt"
    path.write_bytes("Clich\u00e9\n\nact two\n".encode("latin-1"))
    found = dataset.read_rows(path, "latin-1")
    assert (found.kind, len(found)) == (dataset.STREAM, 1)
    assert found.rows[0].values["text"] == "Clich\u00e9\n\nact two\n"
    with pytest.raises(DataError) as error:
        dataset.read_rows(path)
    message = "line 1: byte 0xe9 at offset 5 is not valid utf-8; convert the file, or name its "
    assert message + "encoding (perhaps --encoding latin-1)" in str(error.value)


BAD = {
    "{": "not valid JSON (Expecting property name enclosed in double quotes at column 2)",
    "[1]": "a JSON list, not an object",
    "null": "a JSON null, not an object",
    "[" * 100_000: "nested too deeply",
    "{}": "has no keys; a row must be",
    '{"txt": "x"}': "has the keys 'txt'; a row must be",
    '{"text": "x", "messages": []}': "has the keys 'text', 'messages'; a row must be",
    '{"prompt": "x"}': "has the keys 'prompt'; a row must be",
    '{"text": 1}': "text is a JSON number, not a string",
    '{"text": " \\n"}': "text is empty",
    '{"text": "\\ud800"}': "text contains half of a surrogate pair",
    '{"prompt": "x", "completion": ""}': "completion is empty",
    '{"messages": []}': "messages is an empty list",
    '{"messages": "hi"}': "messages is not a list",
    '{"messages": [{"role": "user"}]}': "messages[0] must have role and content",
    '{"messages": [{"role": "user", "content": null}]}': "messages[0].content is a JSON null",
    '{"messages": [{"role": "user", "content": "x"}]}': "messages contains no assistant turn",
    '{"text": "x", "label": 1.5}': "label is neither a string nor an integer",
    '{"text": "x", "label": true}': "label is neither a string nor an integer",
    '{"text": "x", "label": ""}': "label is empty",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: line[:20])
def test_a_bad_row_is_named_by_its_line(tmp_path, line):
    path = write(tmp_path / "d.jsonl", [{"text": "fine"}, line])
    with pytest.raises(DataError) as error:
        dataset.read_rows(path)
    head, problem = str(error.value).split("\n")
    assert head == f"{path}: 1 bad row; fix or remove them:"
    assert problem.startswith(f"  line 2: {BAD[line]}")


def test_ten_bad_rows_are_listed_and_the_others_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", ["x"] * 13 + [{"text": "fine"}])
    with pytest.raises(DataError, match="13 bad rows") as error:
        dataset.read_rows(path)
    lines = str(error.value).split("\n")
    assert (
        len(lines) == 12 and "line 10: not valid JSON" in lines[10] and lines[11] == "  and 3 more"
    )


def test_kinds_are_not_mixed(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"text": "x"}, {"prompt": "x", "completion": "y"}])
    with pytest.raises(DataError, match="line 2 is a completion row, but line 1 is a text row"):
        dataset.read_rows(path)
    path = write(tmp_path / "d.jsonl", [{"text": "x", "label": 1}, {"text": "x", "label": "1"}])
    with pytest.raises(DataError, match="line 2: the label '1' has another type than 1 in line 1"):
        dataset.read_rows(path)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.jsonl", "", "the file is empty"),
        ("d.jsonl", "\n \n", "the file is empty"),
        ("d.txt", " \n", "text is empty"),
        ("d.csv", "a,b", "rename it to .jsonl"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        dataset.read_rows(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl: No such file"):
        dataset.read_rows(tmp_path / "none.jsonl")
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(DataError, match="unknown encoding 'latin-99'"):
        dataset.read_rows(tmp_path / "d.txt", "latin-99")
