"""Parsing and splitting of reviews."""

import pytest

from examples.sentiment import reviews
from lora_jax.training import DataError, Row, Rows

LINES = [
    "1\t2.5\tA joy from start to end.",
    "2\t-0.49\tNeither here nor there.",
    "3\t-3.1\tA clich\u00e9 & a bore",
    "4\t0.5\t  Just about good  ",
    "5\t-1.0\ta JOY from start to end.",
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_bytes("\r\n".join([*LINES, ""]).encode())
    return path


def test_read(file):
    found = reviews.read(file)
    assert found.kind == "label" and found.source == str(file)
    assert [(row.line, row.values["text"], row.values["label"]) for row in found.rows] == [
        (1, "A joy from start to end.", 1),
        (3, "A clich\u00e9 & a bore", 0),
        (4, "Just about good", 1),
    ]


def test_latin_1_lines(file):
    file.write_bytes("\r\n".join(LINES).encode("latin-1"))
    assert reviews.read(file).rows[1].values["text"] == "A clich\u00e9 & a bore"


@pytest.mark.parametrize("line", ["6\t1.5", "6\tgood\tindeed", "no tabs at all"])
def test_a_malformed_line(file, line):
    file.write_text("\n".join([*LINES, line]))
    with pytest.raises(DataError, match="line 6: not 'number, rating, text'"):
        reviews.read(file)


def numbered(n: int) -> Rows:
    rows = tuple(Row(i, {"text": str(i), "label": i % 2}) for i in range(n))
    return Rows("reviews.txt", "label", rows)


def test_split_is_disjoint_and_repeatable():
    everything = numbered(50)
    train, held_out = reviews.split(everything, 30, 15)
    assert (len(train), len(held_out)) == (30, 15)
    lines = [{row.line for row in part.rows} for part in (train, held_out)]
    assert not lines[0] & lines[1]
    assert reviews.split(everything, 30, 15)[0] == train
    assert reviews.split(everything, 30, 15, seed=1)[0] != train


def test_split_asks_too_much():
    message = r"reviews\.txt has 50 reviews, but 30 \+ 21 were requested"
    with pytest.raises(DataError, match=message):
        reviews.split(numbered(50), 30, 21)
