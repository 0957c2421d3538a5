"""Data that is read while it is trained on: every row once, in an order that the seed decides."""

import csv
import dataclasses
import itertools
import json
import tracemalloc
from collections import Counter
from functools import partial

import jax
import numpy as np
import pytest

from lora_jax.training import log
from lora_jax.training.batching import cut_streams, pack_examples
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.dataset import read_rows
from lora_jax.training.errors import DataError
from lora_jax.training.loop import Watcher, train
from lora_jax.training.streaming import pieces, stream
from lora_jax.training.streaming.files import find_files
from lora_jax.training.streaming.pieces import divide
from lora_jax.training.streaming.stream import Reader, Stream, held_out_rows
from lora_jax.training.tokenize import encode_examples, encode_stream
from tests.training import tiny_model

LETTERS = tiny_model.Letters()
COUNT, SIZE = 300, 3
#: Row i spells i in letters, so that it can be told from the others, and has a length of its own.
TEXTS = ["".join("abcdefghij"[int(d)] for d in str(i)) + "k" * (i % 7) for i in range(COUNT)]


def write(path):
    """Write the texts in the format of a file's suffix."""
    kind = path.suffix
    if kind == ".jsonl":  # with a byte order mark, blank lines, and ends of lines of Windows
        lines = [
            json.dumps({"text": text}) + ("\r\n\n" if i % 9 == 0 else "\n")
            for i, text in enumerate(TEXTS)
        ]
        path.write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())
    elif kind == ".json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": TEXTS}), path, row_group_size=130)
    else:
        with path.open("w", newline="") as file:
            rows = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",")
            rows.writerow(["text", "more"])
            rows.writerows([text, 'a "quoted",\nline'] for text in TEXTS)
    return path


def encode(rows):
    return encode_examples(rows, LETTERS, 13, may_be_empty=True).examples or None


def pack(parts):
    return pack_examples([x for part in parts for x in part], 12)


def reader_of(*files, size=200, **more):
    return Reader(divide(files, size), encode, pack, **more)


def texts_in(batches):
    """Return the texts of all rows of batches, decoded."""
    found = []
    for batch in batches:
        for ids, segments in zip(batch["ids"], batch["segments"], strict=True):
            for segment in range(1, segments.max() + 1):
                its = ids[segments == segment].tolist()
                assert its.pop() == LETTERS.eos_id and its.pop(0) == 1  # BOS
                found.append("".join(chr(i - 3 + ord("a")) for i in its))
    return found


def first_epoch(data, size=SIZE, seed=5):
    """Return the texts of the rows that the lanes take from the first epoch."""
    counts = {}
    lanes = [stream._Lane(data.reader, stream.Counts(None), i, size, seed) for i in range(size)]
    for i, lane in enumerate(lanes):
        windows = itertools.takewhile(lambda w: w.key[1] == 0, lane.windows())
        counts[i] = sum(len(lane._pack(w) or ()) for w in windows)
    found = []
    batches = itertools.islice(data.batches_from(size, seed, 0), max(counts.values()))
    for step, batch in enumerate(batches):
        own = [i for i in range(size) if step < counts[i]]
        found += texts_in([{name: x[own] for name, x in batch.items()}])
    return found


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet", ".json"])
def test_every_row_comes_once_in_an_epoch(suffix, tmp_path):
    files = [write(tmp_path / f"{name}{suffix}") for name in ("one", "two", "three")]
    reader = reader_of(*files)
    assert Counter(first_epoch(Stream(reader))) == Counter(3 * TEXTS)
    if suffix != ".json":
        assert len(reader.pieces) > 3 * WIDE
        assert all(piece.size < 500 for piece in reader.pieces)
    one, other = (first_epoch(Stream(reader), seed=seed) for seed in (5, 6))
    assert one != other and one[:50] != (3 * TEXTS)[:50]


WIDE = 5


def take(data, step, count, **more):
    return list(itertools.islice(data.batches_from(SIZE, 5, step, **more), count))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("keeps", [True, False])
def test_resuming_at_any_step_is_exact(keeps, tmp_path):
    """With the counts that a run wrote, and without; also after an epoch or two."""
    reader = reader_of(write(tmp_path / "d.jsonl"))
    directory = tmp_path if keeps else None
    whole = take(Stream(reader, directory), 0, 120)
    for step in (1, 7, 40, 119):
        resumed = take(Stream(reader, directory), step, 120 - step)
        assert_same(resumed, whole[step:])
    assert len(set(texts_in(whole[:110]))) == COUNT  # more than an epoch


def test_counts_save_reading(tmp_path, monkeypatch):
    reader = reader_of(write(tmp_path / "d.jsonl"))
    whole = take(Stream(reader, tmp_path), 0, 80)
    with (tmp_path / "rows-0.jsonl").open("a") as file:
        file.write('[0, 0, "torn')
    read = []
    encoded = dataclasses.replace(reader, encode=lambda rows: read.append(rows) or encode(rows))
    assert_same(take(Stream(encoded, tmp_path), 78, 2), whole[78:])
    assert len(read) <= 2 * SIZE * stream.WINDOW  # a window of each lane and the next


def test_processes_share_the_work_and_nothing_else_changes(tmp_path):
    """Each reads the pieces of its own rows; together they read every piece once."""
    reader = reader_of(write(tmp_path / "d.jsonl"))
    whole = take(Stream(reader), 0, 25)
    read = []
    shares = []
    for own in ([0, 2], [1]):
        seen = []
        note = lambda rows, seen=seen: seen.append(rows.rows[0].values["text"]) or encode(rows)
        found = take(Stream(dataclasses.replace(reader, encode=note)), 0, 25, own=own)
        read.append(set(seen))
        shares.append(found)
        others = sorted(set(range(SIZE)) - set(own))
        for a, b in zip(found, whole, strict=True):
            np.testing.assert_array_equal(a["ids"][own], b["ids"][own])
            assert a["ids"].shape == b["ids"].shape and not a["ids"][others].any()
    assert not read[0] & read[1]


def test_the_order_of_the_files(tmp_path):
    reader = reader_of(write(tmp_path / "d.jsonl"))
    batches = lambda step, count, own=None: list(
        itertools.islice(Stream(reader).batches_from(4, None, step, own), count)
    )
    reader = dataclasses.replace(
        reader, pack=lambda parts: pack_examples([x for p in parts for x in p], 12, stream_order)
    )
    whole = batches(0, 20)
    found = texts_in(whole)
    assert found == TEXTS[: len(found)] and len(found) > 80
    assert_same(batches(9, 11), whole[9:])
    for part, batch in zip(batches(0, 20, [1, 3]), whole, strict=True):
        np.testing.assert_array_equal(part["ids"][[1, 3]], batch["ids"][[1, 3]])


def stream_order(*arguments):
    from lora_jax.training.packing import assign_in_order

    return assign_in_order(*arguments)


def test_a_large_text_is_cut_at_ends_of_lines(tmp_path):
    """Its tokens are those of the whole text, but for the first one of each piece."""
    path = tmp_path / "d.txt"
    path.write_text("".join(text + "\n" for text in TEXTS))
    encoding = partial(encode_stream, tokenizer=LETTERS, may_be_empty=True)
    reader = Reader(divide([path], 100), encoding, partial(cut_streams, length=12))
    data = reader.read(range(len(reader.pieces)))
    whole = encode_stream(read_rows(path), LETTERS)
    assert data.arrays["weights"].sum() == len(whole) - len(reader.pieces)
    rows = [
        ids[seg > 0] for ids, seg in zip(data.arrays["ids"], data.arrays["segments"], strict=True)
    ]
    assert "".join(map(str, whole[:40])).startswith("".join(map(str, rows[0])))


def test_held_out_rows_are_not_trained_on(tmp_path):
    reader = reader_of(write(tmp_path / "d.jsonl"), held_out=0.25, seed=3)
    held = texts_in([held_out_rows(reader, 10**6).arrays])
    trained = first_epoch(Stream(reader))
    assert Counter(held) + Counter(trained) == Counter(TEXTS)
    assert 0.15 * COUNT < len(held) < 0.35 * COUNT
    assert len(held_out_rows(reader, 5)) == 5


def test_the_rows_of_an_epoch_are_estimated(tmp_path):
    reader = reader_of(write(tmp_path / "d.jsonl"))
    exact = len(reader.read(range(len(reader.pieces))))
    assert Stream(reader).steps_per_epoch(1) == pytest.approx(exact, rel=0.25)


def test_the_checksum_tells_data_apart(tmp_path):
    first = write(tmp_path / "d.jsonl")
    before = Stream(reader_of(first)).checksum()
    assert Stream(reader_of(first)).checksum() == before
    assert Stream(reader_of(first, first)).checksum() != before
    first.write_text(first.read_text("utf-8-sig").replace("ck", "kc"))
    assert Stream(reader_of(first)).checksum() != before


@pytest.mark.parametrize(
    "suffix, line, expected",
    [
        (".jsonl", '{"text": "a"', "line 201: not valid JSON"),
        (".jsonl", '{"prompt": "a", "completion": "b"}', "line 201 is a completion row"),
        (".jsonl", '{"text": "a"}\n{"label": 1, "text": "b"}', "line 202"),
        (".csv", "a,b,c", "row 200: has 3 columns"),
    ],
)
def test_damage_is_named_by_its_line(suffix, line, expected, tmp_path):
    """Wherever the piece begins that has it: 200 rows come before, or a header and 199."""
    path = tmp_path / f"d{suffix}"
    header = "text,more\n" if suffix == ".csv" else ""
    row = "{},x" if suffix == ".csv" else '{{"text": "{}"}}'
    lines = [row.format(text) for text in TEXTS]
    lines[199 if header else 200] = line
    path.write_text(header + "\n".join(lines) + "\n")
    with pytest.raises(DataError) as error:
        reader = reader_of(path)
        for i in range(len(reader.pieces)):
            reader.read([i])
    assert expected in str(error.value).replace("\n", " "), error.value
    assert str(path) in str(error.value)


def test_damage_ends_a_run_that_has_saved_what_it_did(tmp_path):
    path = write(tmp_path / "d.jsonl")
    reader = reader_of(path)
    clean = Stream(reader)
    job, start = tiny_model.job(tmp_path / "run", steps=200)
    bad = set(texts_in(take(clean, 20, 1)))
    has_begun = []

    def broken(rows):
        if has_begun and any(row.values["text"] in bad for row in rows.rows):
            raise DataError("line 7: damaged")
        return [dataclasses.replace(x, ids=x.ids % tiny_model.VOCABULARY) for x in encode(rows)]

    data = Stream(dataclasses.replace(reader, encode=broken))
    assert data.steps_per_epoch(3) > 20  # this reads some rows
    has_begun.append(True)
    with pytest.raises(DataError, match="line 7"):
        train(dataclasses.replace(job, data=data), start)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        (step,) = checkpoints.steps()
    assert [r["step"] for r in log.read(tmp_path / "run" / "log.jsonl")] == list(range(1, step + 1))


def test_a_run_is_resumed_exactly(tmp_path):
    reader = reader_of(write(tmp_path / "d.jsonl"))
    small = lambda rows: [
        dataclasses.replace(x, ids=x.ids % tiny_model.VOCABULARY) for x in encode(rows)
    ]
    data = lambda out: Stream(dataclasses.replace(reader, encode=small), out)
    (tmp_path / "run").mkdir()
    whole, start = tiny_model.job(None, steps=30, data=data(None))
    expected = train(whole, start)
    job, _ = tiny_model.job(tmp_path / "run", steps=30, data=data(tmp_path / "run"))
    seen = []
    stop = Watcher(lambda: 11 in seen, lambda record: seen.append(record["step"]))
    assert train(job, start, stop).step == 12
    resumed = train(job, start)
    one, other = ([*map(log.without_speed, x.records)] for x in (resumed, expected))
    assert one == other
    for a, b in zip(*map(jax.tree.leaves, (resumed.adapters, expected.adapters)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_little_is_read_before_the_first_batch(tmp_path, monkeypatch):
    """By the bytes that are read of a file: those of two windows per lane, and of no more."""
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 100))
    read = []
    plain = pieces._bytes
    monkeypatch.setattr(pieces, "_bytes", lambda p, a, b: read.append(b - a) or plain(p, a, b))
    data = Stream(reader_of(path, size=2000))
    take(data, 0, 1)
    # the kind of rows is judged by the first piece
    assert sum(read) < (1 + 2 * SIZE * stream.WINDOW) * 2100 < path.stat().st_size / 8


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """Of 80 MB, 200 batches of 4 rows take few, and a tenth of them as much as the whole."""
    text = "".join(json.dumps({"text": text * 20}) + "\n" for text in TEXTS)
    path = tmp_path / "d.jsonl"
    long = partial(encode_examples, tokenizer=LETTERS, length=13, may_be_empty=True)
    peaks = []
    for times in (80, 800):
        path.write_text(text * times)
        reader = Reader(divide([path], stream.PIECE), lambda rows: long(rows).examples, pack)
        tracemalloc.start()
        for _ in itertools.islice(Stream(reader).batches_from(4, 5, 0), 200):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 30e6
    assert max(peaks) < 1.3 * min(peaks) < 400e6, peaks


def test_too_little_data_for_so_many_rows(tmp_path):
    data = Stream(reader_of(write(tmp_path / "d.jsonl"), size=10**6))
    with pytest.raises(DataError, match=r"1 parts, too few to read 3 rows.*leave out --stream"):
        take(data, 0, 1)


def test_files_directories_and_patterns(tmp_path):
    names = ["b.jsonl", "a.jsonl", "more/c.jsonl", "readme.md", "d.csv"]
    (tmp_path / "more").mkdir()
    for name in names:
        (tmp_path / name).touch()
    found = lambda *given: [str(x.relative_to(tmp_path)) for x in find_files(given)]
    assert found(tmp_path) == ["a.jsonl", "b.jsonl", "d.csv", "more/c.jsonl"]
    assert found(tmp_path / "b.jsonl", tmp_path / "*.jsonl") == ["b.jsonl", "a.jsonl", "b.jsonl"]
    assert found(tmp_path / "**" / "[c-d].*") == ["d.csv", "more/c.jsonl"]
    assert found(tmp_path / "missing.jsonl") == ["missing.jsonl"]  # reading says so
    (tmp_path / "[x].jsonl").touch()
    assert found(tmp_path / "[x].jsonl") == ["[x].jsonl"]
    with pytest.raises(DataError, match="no file fits this pattern"):
        find_files([tmp_path / "*.parquet"])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="none: the directory has no file of data"):
        find_files([tmp_path / "none"])
    with pytest.raises(DataError, match="utf-16 cannot be streamed"):
        divide([tmp_path / "a.jsonl"], 10, "utf-16")
    with pytest.raises(DataError, match=r"cannot read .*missing.jsonl: No such file"):
        divide([tmp_path / "missing.jsonl"], 10)
    with pytest.raises(DataError, match=r"readme.md: unknown file type"):
        divide([tmp_path / "readme.md"], 10)
