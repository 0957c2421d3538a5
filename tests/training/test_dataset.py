"""Reading data files: what is read, and the message for each bad row."""

import json
import sys

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
    '{"messages": [{"role": "assistant", "content": " "}]}': "messages[0].content is empty",
    '{"messages": [{"role": "assistant", "tool_calls": []}]}': "messages[0] must have role and",
    '{"messages": [{"role": 3, "content": "x"}]}': "messages[0].role is not the name of a role",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "messages[0].content[0] is",
    '{"messages": [{"role": "user", "content": [3]}]}': "messages[0].content[0] is",
    '{"messages": [{"role": "user", "content": {"a": 1}}]}': "messages[0].content is a JSON",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "messages[0].content contains half",
    '{"messages": [{"role": "assistant", "tool_calls": [{"\\udfff": 1}]}]}': "a key of messages",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": {}}': "tools is not a list",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": "[{"}': "tools is a string",
    '{"conversations": [{"from": "alien", "value": "x"}]}': "conversations[0].from is 'alien',",
    '{"conversations": [{"from": "human", "value": "x"}]}': "conversations contains no assistant",
    '{"instruction": "x", "output": ""}': "output is empty",
    '{"instruction": "x", "input": 3, "output": "y"}': "input is a JSON number",
    '{"instruction": "x"}': "has the keys 'instruction'; a row must be",
    '{"prompt": null, "completion": "x"}': "prompt is a JSON null, not a string",
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
        ("d.xml", "a,b", "rename it to .jsonl"),
        ("d.csv", "text,label", "the file is empty"),
        ("d.csv", "text\na,b", "row 1: has 2 columns, but the header has 1; put text .* quotes"),
        ("d.csv", 'text\n"a', "line 2: unexpected end of data"),
        ("d.csv", "a,b\nc,d", "row 1: has the keys 'a', 'b'; a row must be"),
        ("d.json", "[", r"not valid JSON \(Expecting value at line 1, column 2\)"),
        ("d.json", "[]", "the file is empty"),
        ("d.json", "[" + "9" * 5000 + "]", "not valid JSON"),
        ("d.json", '[{"text": "a"}, 3]', "row 2: a JSON number, not an object"),
        ("d.parquet", "text", "cannot be read as Parquet"),
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


USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f"}}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
ACCEPTED = {
    "empty system": (
        {"messages": [{"role": "system", "content": ""}, USER, SAID]},
        {"messages": [{"role": "system", "content": ""}, USER, SAID]},
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [PARTS[0], "b"]}, SAID]},
        {"messages": [{"role": "user", "content": PARTS}, SAID]},
    ),
    "null content beside a call": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
    ),
    "no content beside a call": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
    ),
    "tools": (
        {"messages": [USER, SAID], "tools": [TOOL]},
        {"messages": [USER, SAID], "tools": [TOOL]},
    ),
    "tools as text": (
        {"messages": [USER, SAID], "tools": json.dumps([TOOL])},
        {"messages": [USER, SAID], "tools": [TOOL]},
    ),
    "no tools": ({"messages": [USER, SAID], "tools": None}, {"messages": [USER, SAID]}),
    "ShareGPT": ({"conversations": SHAREGPT}, {"messages": [USER, SAID]}),
    "ShareGPT's system": (
        {"conversations": SHAREGPT, "system": "Be"},
        {"messages": [{"role": "system", "content": "Be"}, USER, SAID]},
    ),
    "ShareGPT's roles": (
        {"conversation": [{"from": "Human", "value": "Hi"}, {"from": "observation", "value": ""},
                          {"from": "chatgpt", "value": "Yo"}]},
        {"messages": [USER, {"role": "tool", "content": ""}, SAID]},
    ),
    "OpenAI's messages under ShareGPT's key": (
        {"conversations": [USER, SAID]},
        {"messages": [USER, SAID]},
    ),
    "an empty prompt": (
        {"prompt": "", "completion": "x"},
        {"prompt": "", "completion": "x"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_data_as_it_is(tmp_path, name):
    given, expected = ACCEPTED[name]
    (row,) = dataset.read_rows(write(tmp_path / "d.jsonl", [given])).rows
    assert row.values == expected


ALPACA = {"instruction": "Add", "input": "1 2", "output": "3"}


def test_alpaca(tmp_path):
    """A conversation, and the prompt of the file's authors for models without a template."""
    bare = {"instruction": "Sing", "input": "", "output": "la", "text": "Below is ... la"}
    path = write(tmp_path / "d.jsonl", [ALPACA, bare, {**bare, "system": "Be"}])
    found = dataset.read_rows(path)
    turns = [[(m["role"], m["content"]) for m in row.values["messages"]] for row in found.rows]
    assert found.kind == "chat" and found.ignored == ()
    assert turns[0] == [("user", "Add\n1 2"), ("assistant", "3")]
    assert turns[1] == [("user", "Sing"), ("assistant", "la")]
    assert turns[2] == [("system", "Be"), *turns[1]]
    prompts = [row.values["prompt"] for row in found.rows]
    assert prompts[0].endswith("### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n")
    assert prompts[1].endswith("### Instruction:\nSing\n\n### Response:\n")
    assert prompts[2] == "Be\n\n" + prompts[1] and "paired with an input" in prompts[0]
    assert [row.values["completion"] for row in found.rows] == ["3", "la", "la"]


def test_a_list_in_a_json_file(tmp_path):
    (tmp_path / "d.json").write_text("\ufeff" + json.dumps([ALPACA, ALPACA], indent=1))
    found = dataset.read_rows(tmp_path / "d.json")
    assert (found.kind, found.places) == ("chat", ["row 1", "row 2"])
    (tmp_path / "d.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert dataset.read_rows(tmp_path / "d.json").places == ["line 1", "line 2"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("d.csv", 'text,label\n"a, ""b""\nc",1\n\n007,-2\n',
         [{"text": 'a, "b"\nc', "label": 1}, {"text": "007", "label": -2}]),
        ("d.csv", "id;prompt;completion\r\n1;a,b;c\r\n2;;d\r\n",
         [{"prompt": "a,b", "completion": "c"}, {"prompt": "", "completion": "d"}]),
        ("d.tsv", "text\tlabel\na b\tgood\nc\t2x\n",
         [{"text": "a b", "label": "good"}, {"text": "c", "label": "2x"}]),
        ("d.csv", '"messages"\n"[{""role"": ""assistant"", ""content"": ""Yo""}]"\n',
         [{"messages": [SAID]}]),
        ("d.csv", "text\n" + "x" * 200_000, [{"text": "x" * 200_000}]),
    ],
)  # fmt: skip
def test_columns(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content.encode())
    assert [row.values for row in dataset.read_rows(tmp_path / name).rows] == expected


def test_parquet(tmp_path):
    """Tables have every key in every row: those that are null are missing."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    rows = [
        {"messages": [USER, SAID], "id": 1, "tools": None},
        {"messages": [USER, called], "id": 2, "tools": [TOOL]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = dataset.read_rows(tmp_path / "d.parquet")
    assert [row.values for row in found.rows] == [
        {"messages": [USER, SAID]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]},
    ]
    assert (found.ignored, found.places) == (("id",), ["row 1", "row 2"])
    labels = pyarrow.table({"text": ["a", "b"], "label": pyarrow.array([1, None], "int8")})
    parquet.write_table(labels, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="row 2: label is neither a string nor an integer"):
        dataset.read_rows(tmp_path / "d.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "d.parquet")
    assert len(dataset.read_rows(tmp_path / "d.parquet")) == 2


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs the package pyarrow; pip install 'lora-jax\[parq"):
        dataset.read_rows(tmp_path / "d.parquet")


def test_values_nested_too_deeply(tmp_path):
    deep = '{"a":' * 900 + "1" + "}" * 900
    line = '{"messages": [{"role": "assistant", "content": "x"}], "tools": [' + deep + "]}"
    with pytest.raises(DataError, match="line 1: nested too deeply"):
        dataset.read_rows(write(tmp_path / "d.jsonl", [line]))
