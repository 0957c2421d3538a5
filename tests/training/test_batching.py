"""Packing into arrays, batches and their order."""

import numpy as np
import pytest

from lora_jax.training import batching
from lora_jax.training.packing import assign_in_order
from lora_jax.training.tokenize import Example


def example(*ids, prompt=1):
    return Example(np.array(ids, np.int32), np.arange(len(ids)) >= prompt)


def test_examples_in_rows():
    packed = batching.pack_examples([example(5, 6, prompt=0), example(7, 8, 9, prompt=2)], length=5)
    np.testing.assert_array_equal(packed.arrays["ids"], [[7, 8, 9, 5, 6, 0]])
    np.testing.assert_array_equal(packed.arrays["segments"], [[1, 1, 1, 2, 2, 0]])
    # neither the prompt counts, nor a first token, which nothing predicts
    np.testing.assert_array_equal(packed.arrays["weights"], [[0, 0, 1, 0, 1, 0]])
    assert packed.arrays["weights"].dtype == np.float32


@pytest.mark.parametrize("n", [2, 3, 4, 5, 12, 13])
def test_a_stream_counts_every_token_once(n):
    ids = np.arange(1, n + 1, dtype=np.int32)
    arrays = batching.cut_stream(ids, length=3).arrays
    counted = arrays["ids"][arrays["weights"] > 0]
    np.testing.assert_array_equal(counted, ids[1:])
    np.testing.assert_array_equal(arrays["segments"] > 0, arrays["ids"] > 0)
    assert (arrays["weights"][:-1].sum(axis=1) == 3).all()  # all rows but the last are full


def test_labelled_texts():
    texts = [np.full(n, 10 + n, np.int32) for n in (2, 3, 1, 4)]
    packed = batching.pack_labelled(texts, [0, 1, 2, 1], length=5, slots=2).arrays
    for row, slot in np.argwhere(packed["weights"] > 0):
        ids = packed["ids"][row][packed["segments"][row] == slot + 1]
        assert {12: 0, 13: 1, 11: 2, 14: 1}[ids[0]] == packed["labels"][row, slot]
    assert packed["weights"].sum() == 4


def random_texts(n=60, length=16, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 99, rng.integers(1, length + 1)).astype(np.int32) for _ in range(n)]


def test_packed_texts_lose_nothing():
    texts = random_texts()
    packed = batching.pack_texts(texts, length=16, slots=4).arrays
    source = packed["source"]
    assert sorted(source[packed["weights"] > 0]) == list(range(60))
    for row, slot in np.argwhere(packed["weights"] > 0):
        ids = packed["ids"][row][packed["segments"][row] == slot + 1]
        np.testing.assert_array_equal(ids, texts[source[row, slot]])
    assert np.all((packed["ids"] > 0) == (packed["segments"] > 0))
    assert np.mean(packed["ids"] > 0) > 0.9


def test_batches_cover_all_texts_and_fill_up():
    packed = batching.pack_texts(random_texts(), length=16, slots=4)
    size = len(packed) // 2 - 1
    found = list(batching.batches(packed, size))
    assert {batch["ids"].shape for batch in found} == {(size, 16)}
    source = np.concatenate([batch["source"][batch["weights"] > 0] for batch in found])
    assert sorted(source) == list(range(60))
    empty = found[-1]["weights"].max(axis=1) == 0
    assert empty.sum() == -len(packed) % size > 0 and not found[-1]["segments"][empty].any()


def test_labels_added_later():
    texts, labels = random_texts(), [int(text[0]) % 3 for text in random_texts()]
    packed = batching.pack_texts(texts, length=16, slots=4)
    later = batching.add_labels(packed, labels).arrays
    at_once = batching.pack_labelled(texts, labels, length=16, slots=4).arrays
    assert later.keys() == at_once.keys() == {"ids", "segments", "labels", "weights"}
    for name in later:
        np.testing.assert_array_equal(later[name], at_once[name])


def numbered(n) -> batching.Data:
    return batching.Data({"ids": np.arange(1, n + 1)[:, None]})


def test_an_epoch_goes_through_all_rows_once():
    rows = numbered(10)
    assert batching.steps_per_epoch(10, 4) == 3
    steps = [batching.batch_of_step(rows, 4, seed=3, step=s)["ids"].ravel() for s in range(6)]
    epochs = [np.concatenate(steps[:3]), np.concatenate(steps[3:])]
    for epoch in epochs:
        assert sorted(epoch) == [0, 0, *range(1, 11)]
    assert not np.array_equal(*epochs)
    again = batching.batch_of_step(rows, 4, seed=3, step=4)["ids"].ravel()
    np.testing.assert_array_equal(again, steps[4])
    other = [batching.batch_of_step(rows, 4, seed=4, step=s)["ids"].ravel() for s in range(3)]
    assert not np.array_equal(np.concatenate(other), epochs[0])


def test_an_epoch_in_the_rows_order():
    steps = [
        batching.batch_of_step(numbered(5), 2, seed=None, step=s)["ids"].ravel() for s in range(6)
    ]
    assert [s.tolist() for s in steps] == [[1, 2], [3, 4], [5, 0]] * 2


@pytest.mark.parametrize("lengths", [[2, 1, 2, 3, 5, 1], [1] * 11, [5, 1, 5]])
def test_examples_packed_in_order(lengths):
    """Best-fit packing would start with the longest."""
    examples = [example(*[10 + i] * n, prompt=0) for i, n in enumerate(lengths)]
    laid = batching.pack_examples(examples, length=4, by=assign_in_order).arrays
    read = laid["ids"][laid["segments"] > 0]
    np.testing.assert_array_equal(read, np.repeat(10 + np.arange(len(lengths)), lengths))


def test_labelled_texts_in_order():
    texts = [np.full(n, 10 + n, np.int32) for n in (2, 3, 1, 4)]
    packed = batching.pack_labelled(texts, [0, 1, 2, 1], 6, slots=2, by=assign_in_order).arrays
    np.testing.assert_array_equal(packed["labels"], [[0, 1], [2, 1]])
    np.testing.assert_array_equal(packed["ids"][1], [11, 14, 14, 14, 14, 0])


def test_batches_in_order():
    found = [batch["ids"].ravel().tolist() for batch in batching.batches(numbered(5), 2)]
    assert found == [[1, 2], [3, 4], [5, 0]]


@pytest.mark.parametrize("count, share", [(1, 0.5), (10, 0.01), (10, 1.0), (3, 0.9)])
def test_a_part_that_would_be_empty(count, share):
    with pytest.raises(ValueError, match="examples leaves one part empty"):
        batching.hold_out(count, share, seed=0)


def test_held_out_parts_are_disjoint():
    train, held = batching.hold_out(100, 0.1, seed=1)
    assert len(held) == 10 and sorted([*train, *held]) == list(range(100))
    assert not np.array_equal(held, batching.hold_out(100, 0.1, seed=2)[1])
