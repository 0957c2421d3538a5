"""Labelled texts, the head on a model, predictions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training import batching, classification
from lora_jax.training.dataset import Row, Rows
from lora_jax.training.errors import DataError
from tests.training.tiny_model import Letters


class Marked(Letters):
    """A BERT-like tokenizer: 0 before a text, 99 after it."""

    def encode(self, text, special=False):
        ids = super().encode(text)
        return [0, *ids, 99] if special else ids


def rows(*pairs):
    values = [{"text": text, "label": label} for text, label in pairs]
    return Rows("d.jsonl", "label", tuple(Row(i, v) for i, v in enumerate(values, start=1)))


def test_classes_and_ids():
    found = rows(("ab", "pos"), ("abcd", "neg"), ("c", "pos"))
    known = classification.classes(found)
    assert known == ("neg", "pos")
    encoded = classification.encode_labelled(found, Marked(), known, length=5)
    assert [list(text) for text in encoded.texts] == [[0, 3, 4, 99], [0, 3, 4, 5, 99], [0, 5, 99]]
    assert all(text.dtype == np.int32 for text in encoded.texts)
    assert list(encoded.labels) == [1, 0, 1]
    assert encoded.notes == ("1 of 3 texts exceed 5 tokens: truncated",)


def test_what_is_refused():
    with pytest.raises(DataError, match="all rows have the label 3; a classifier needs two"):
        classification.classes(rows(("a", 3), ("b", 3)))
    with pytest.raises(DataError, match="line 2: the label 4 is not one of \\[1, 2\\]"):
        classification.encode_labelled(rows(("a", 1), ("b", 4)), Marked(), (1, 2), 9)
    texts = Rows("d.jsonl", "text", (Row(1, {"text": "a"}),))
    for refuse in (
        classification.classes,
        lambda r: classification.encode_labelled(r, Marked(), (0, 1), 9),
    ):
        with pytest.raises(DataError, match="has text rows, but a classifier needs"):
            refuse(texts)


def test_tokens_beyond_the_vocabulary():
    found = rows(("a", 1), ("bc", 2))
    with pytest.raises(DataError, match=r"line 1 and 1 more of 2 rows: the token 99 is beyond"):
        classification.encode_labelled(found, Marked(), (1, 2), 9, vocabulary=99)
    assert classification.encode_labelled(found, Marked(), (1, 2), 9, vocabulary=100).texts


def hidden(params, ids, segments):
    """Look up two numbers per token."""
    return params["table"][ids]


TABLE = {"table": np.random.default_rng(0).normal(size=(99, 2)).astype(np.float32)}


def test_the_head_reads_the_mean():
    model, params = classification.with_head(hidden, TABLE, 2, classes=3, slots=2, seed=0)
    ids, segments = np.array([[5, 7, 9, 0]]), np.array([[1, 1, 2, 0]])
    means = np.stack([TABLE["table"][[5, 7]].mean(axis=0), TABLE["table"][9]])[None]
    np.testing.assert_allclose(model.embed(params, ids, segments), means, rtol=1e-6)
    expected = means @ params["head"]["kernel"]
    np.testing.assert_allclose(model(params, ids, segments), expected, rtol=1e-5)
    np.testing.assert_array_equal(params["head"]["bias"], np.zeros(3, np.float32))
    _, given = classification.with_head(
        hidden, TABLE, 2, 3, 2, seed=0, initializer=lambda key, shape: jnp.ones(shape)
    )
    np.testing.assert_array_equal(given["head"]["kernel"], np.ones((2, 3)))


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_predictions_are_in_the_texts_order(rows):
    model, params = classification.with_head(hidden, TABLE, 2, classes=3, slots=2, seed=0)
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, 99, rng.integers(1, 6)).astype(np.int32) for _ in range(17)]
    packed = batching.pack_texts(texts, length=8, slots=2)
    totals = []

    def watch(batches, total):
        totals.append(total)
        return batches

    found = classification.predict(jax.jit(model.embed), params, packed, rows, watch)
    expected = [TABLE["table"][text].mean(axis=0) for text in texts]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert totals == [-(-len(packed) // rows)]
