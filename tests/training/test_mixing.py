"""Files with weights: how often each row is visited, in memory and streamed, resumed anywhere."""

import collections
import itertools

import numpy as np
import pytest

from lora_jax.training.batching import Data, batch_of_step
from lora_jax.training.errors import DataError
from lora_jax.training.mixing.mixture import Mixture, mix
from lora_jax.training.mixing.visits import items
from lora_jax.training.mixing.weights import parse
from lora_jax.training.streaming.pieces import divide
from lora_jax.training.streaming.stream import Reader, Stream

SIZE = 4
ROWS, WEIGHTS = (10, 6, 5), (1, 2, 0.5)


def data(start, rows):
    return Data({"ids": np.arange(start, start + rows, dtype=np.int32)[:, None] + 1})


@pytest.fixture
def mixture():
    """Return rows 1 to 10, 11 to 16 and 17 to 21."""
    return mix([data(start, rows) for start, rows in zip((0, 10, 16), ROWS, strict=True)], WEIGHTS)


def visited(data, seed, epochs):
    """Count the rows of so many epochs."""
    steps = data.steps_per_epoch(SIZE) * epochs
    batches = itertools.islice(data.batches_from(SIZE, seed, 0), steps)
    ids = np.concatenate([batch["ids"][:, 0] for batch in batches])
    return collections.Counter(ids[ids > 0].tolist())


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_are_visited_as_often_as_their_weights_say(mixture, seed):
    """Of five rows with a weight of 0.5 two come in an epoch (5 · 0.5 = 2.5, rounded to even)."""
    assert mixture.visited == 10 + 12 + 2 and mixture.steps_per_epoch(SIZE) == 6
    counts = visited(mixture, seed, epochs=5)
    assert [counts[row] for row in range(1, 17)] == [5] * 10 + [10] * 6
    assert [counts[row] for row in range(17, 22)] == [2] * 5  # all equally often: 5 epochs of 2
    orders = [mixture.order(seed, epoch).tolist() for epoch in range(3)]
    assert len(set(map(str, orders))) > 1


def test_every_turn_through_a_source_has_its_order():
    first, second = items(range(24), 12, 3, 0).reshape(2, 12)
    assert sorted(first) == sorted(second) == [*range(12)] and (first != second).any()
    assert (items(range(24), 12, 3, 1)[:12] != first).any()  # and every source its own


def test_any_step_alone_is_that_of_the_sequence(mixture):
    batches = itertools.islice(mixture.batches_from(SIZE, 7, 0), 15)
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch_of_step(mixture, SIZE, 7, step)["ids"], batch["ids"])


def test_without_weights_nothing_changes(mixture):
    one = data(0, 9)
    assert mix([one], [1.0]) is one
    assert isinstance(mix([one], [2.0]), Mixture) and mix([one], [2.0]).visited == 18
    other = mix([data(0, 10), data(10, 6), data(16, 5)], (1, 2, 0.25))
    assert other.checksum() != mixture.checksum()
    np.testing.assert_array_equal(other.arrays["ids"], mixture.arrays["ids"])


@pytest.fixture
def stream(tmp_path):
    """Return a function that streams three files of numbered lines in pieces of a line or two."""
    starts = (100, 200, 300)
    files = [tmp_path / f"{start}.jsonl" for start in starts]
    for file, start in zip(files, starts, strict=True):
        file.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(start, start + 12)))

    def make(weights, directory=None):
        parts = [divide([file], 1) for file in files]
        sources = tuple(zip(map(len, parts), weights, strict=True))
        encode = lambda rows: [int(row.values["text"]) for row in rows.rows]
        pack = lambda found: Data({"ids": np.concatenate(found).astype(np.int32)[:, None]})
        pieces = tuple(itertools.chain(*parts))
        return Stream(Reader(pieces, encode, pack, sources=sources), directory)

    return make


def take(stream, step, steps, seed=5, size=SIZE):
    batches = itertools.islice(stream.batches_from(size, seed, step), steps)
    return [batch["ids"][:, 0].tolist() for batch in batches]


def test_a_stream_visits_lines_as_often_as_their_weights_say(stream):
    """In one lane, in files' order: 12 lines, then 24, then 6; in the next epoch the other 6."""
    one = stream((1, 2, 0.5))
    assert one.steps_per_epoch(1) == 42
    lines = [row for (row,) in take(one, 0, 84, seed=None, size=1)]
    for epoch in (lines[:42], lines[42:]):
        assert epoch[:36] == [*range(100, 112), *range(200, 212), *range(200, 212)]
    assert lines[36:42] + lines[78:] == [*range(300, 312)]

    shuffled = itertools.chain(*take(one, 0, 84, seed=5, size=1))  # two epochs
    counts = collections.Counter(shuffled)
    assert [counts[n] for n in (*range(100, 112), *range(200, 212), *range(300, 312))] == (
        [2] * 12 + [4] * 12 + [1] * 12
    )


def test_a_resumed_stream_takes_the_same_batches(stream, tmp_path):
    weights = (1, 2, 0.5)
    whole = take(stream(weights), 0, 24)
    for step in (1, 10, 11, 17):
        assert take(stream(weights), step, 24 - step) == whole[step:]
    assert take(stream(weights, tmp_path), 0, 9) == whole[:9]  # with counts on the disk
    assert take(stream(weights, tmp_path), 9, 15) == whole[9:]
    assert stream(weights).checksum() != stream((1, 2, 0.25)).checksum()


def test_names_with_weights(tmp_path):
    (tmp_path / "a=2").write_text("x")
    names = [tmp_path / "a=2", "b.jsonl=0.25", "c=d.txt", "*.csv=3", "=4"]
    assert [(str(path), weight) for path, weight in parse(names)] == [
        (str(tmp_path / "a=2"), 1),
        ("b.jsonl", 0.25),
        ("c=d.txt", 1),
        ("*.csv", 3),
        ("=4", 1),
    ]
    for wrong in ("a=0", "a=-1", "a=inf", "a=nan", "a=1001"):
        with pytest.raises(DataError, match=f"{wrong}: a weight must be above 0 and at most 1000"):
            parse([wrong])
