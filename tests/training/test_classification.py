"""Labelled texts."""

import numpy as np
import pytest

from lora_jax.training import labels
from lora_jax.training.dataset import Row, Rows
from lora_jax.training.errors import DataError
from tests.training.tiny_model import Letters


class Marked(Letters):
    """A BERT-like tokenizer: 0 before, 99 behind."""

    def encode(self, text, special=False):
        ids = super().encode(text)
        return [0, *ids, 99] if special else ids


def rows(*pairs):
    values = [{"text": text, "label": label} for text, label in pairs]
    return Rows("d.jsonl", "label", tuple(Row(i, v) for i, v in enumerate(values, start=1)))


def test_classes_and_ids():
    found = rows(("ab", "pos"), ("abcd", "neg"), ("c", "pos"))
    known = labels.classes(found)
    assert known == ("neg", "pos")
    encoded = labels.encode(found, Marked(), known, length=5)
    assert [list(text) for text in encoded.texts] == [[0, 3, 4, 99], [0, 3, 4, 5, 99], [0, 5, 99]]
    assert all(text.dtype == np.int32 for text in encoded.texts)
    assert list(encoded.labels) == [1, 0, 1]
    assert encoded.notes == ("1 of 3 texts exceed 5 tokens: cut off",)


def test_what_is_refused():
    with pytest.raises(DataError, match="all rows have the label 3; two are needed"):
        labels.classes(rows(("a", 3), ("b", 3)))
    with pytest.raises(DataError, match="line 2: the label 4 is not one of \\[1, 2\\]"):
        labels.encode(rows(("a", 1), ("b", 4)), Marked(), (1, 2), 9)
    texts = Rows("d.jsonl", "text", (Row(1, {"text": "a"}),))
    for refuse in (labels.classes, lambda r: labels.encode(r, Marked(), (0, 1), 9)):
        with pytest.raises(DataError, match="text rows; --task classification needs"):
            refuse(texts)
