"""Parsing, splitting, tokenising and packing of reviews."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from examples.sentiment import reviews
from examples.sentiment.reviews import Reviews
from lora_jax.training import packing

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
    assert found.texts == ("A joy from start to end.", "A clich\u00e9 & a bore", "Just about good")
    np.testing.assert_array_equal(found.labels, np.array([1, 0, 1], np.int32))


def test_latin_1_lines(file):
    file.write_bytes("\r\n".join(LINES).encode("latin-1"))
    assert reviews.read(file).texts[1] == "A clich\u00e9 & a bore"


@pytest.mark.parametrize("line", ["6\t1.5", "6\tgood\tindeed", "no tabs at all"])
def test_a_line_that_is_none(file, line):
    file.write_text("\n".join([*LINES, line]))
    with pytest.raises(reviews.ReviewsError, match="line 6: not 'number, rating, text'"):
        reviews.read(file)


def numbered(n: int) -> Reviews:
    return Reviews(tuple(map(str, range(n))), np.arange(n, dtype=np.int32) % 2)


def test_split_is_disjoint_and_the_same_again():
    everything = numbered(50)
    train, held_out = reviews.split(everything, 30, 15)
    assert (len(train), len(held_out)) == (30, 15)
    assert not set(train.texts) & set(held_out.texts)
    assert all(int(t) % 2 == label for t, label in zip(train.texts, train.labels, strict=True))
    assert reviews.split(everything, 30, 15)[0].texts == train.texts
    assert reviews.split(everything, 30, 15, seed=1)[0].texts != train.texts


def test_split_asks_too_much():
    with pytest.raises(
        reviews.ReviewsError, match="30 \\+ 21 reviews were asked for; there are 50"
    ):
        reviews.split(numbered(50), 30, 21)


def test_labels_must_fit_the_texts():
    with pytest.raises(ValueError, match="2 texts, but labels of shape"):
        Reviews(("a", "b"), np.zeros(3, np.int32))


def test_tokenize_cuts_and_does_not_pad(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "good": 1, "bad": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ("good", "bad good odd", "bad bad bad bad")
    tokens = reviews.tokenize(texts, tmp_path / "tokenizer.json", max_length=3)
    assert [list(text) for text in tokens] == [[1], [2, 1, 0], [2, 2, 2]]
    assert tokens[0].dtype == np.int32


def random_texts(n=60, capacity=16, seed=0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 99, rng.integers(1, capacity + 1)).astype(np.int32) for _ in range(n)]


def test_assign_by_hand():
    # 6 and 5 get a row each; 3 and the first 2 share one; the other 2 opens one; 1 fills 3 + 2 up.
    assert packing.assign([2, 3, 6, 1, 5, 2], capacity=6, slots=4) == [[2], [4], [1, 0, 3], [5]]
    assert packing.assign([1, 1, 1], capacity=6, slots=2) == [[0, 1], [2]]


@pytest.mark.parametrize("lengths", [[3, 7], [0]])
def test_assign_refuses(lengths):
    with pytest.raises(ValueError, match="a row holds 1 to 6"):
        packing.assign(lengths, capacity=6, slots=2)
    with pytest.raises(ValueError, match="a row holds 1 to 6"):
        packing.assign_in_order(lengths, capacity=6, slots=2)


def test_pack_loses_nothing():
    texts = random_texts()
    packed = packing.pack(texts, capacity=16, slots=4)
    assert sorted(packed.source[packed.source >= 0]) == list(range(60))
    for row, slot in np.argwhere(packed.source >= 0):
        ids = packed.ids[row][packed.segments[row] == slot + 1]
        np.testing.assert_array_equal(ids, texts[packed.source[row, slot]])
    assert np.all((packed.ids > 0) == (packed.segments > 0))
    assert np.mean(packed.ids > 0) > 0.9


def test_batches_cover_all_rows_and_fill_up():
    packed = packing.pack(random_texts(), capacity=16, slots=4)
    size = len(packed) // 2 - 1
    found = list(packing.batches(packed, size))
    assert {batch.ids.shape for batch in found} == {(size, 16)}
    source = np.concatenate([batch.source.ravel() for batch in found])
    assert sorted(source[source >= 0]) == list(range(60))
    empty = found[-1].source.max(axis=1) < 0
    assert empty.sum() == -len(packed) % size > 0 and not found[-1].segments[empty].any()


def test_shuffled_batches_repeat_nothing_within_a_round():
    packed = packing.pack(random_texts(), capacity=16, slots=4)
    per_round = len(packed) // 7
    stream = packing.shuffled_batches(packed, 7, seed=3)
    rounds = [np.concatenate([next(stream).source for _ in range(per_round)]) for _ in range(2)]
    for source in rounds:
        assert np.unique(source[source >= 0], return_counts=True)[1].max() == 1
    assert not np.array_equal(*rounds)
    again = packing.shuffled_batches(packed, 7, seed=3)
    np.testing.assert_array_equal(next(again).source, rounds[0][:7])


def test_too_large_a_batch():
    packed = packing.pack(random_texts(4), capacity=16, slots=4)
    with pytest.raises(ValueError, match="a batch of 9 rows was asked for"):
        next(packing.shuffled_batches(packed, 9, seed=0))
