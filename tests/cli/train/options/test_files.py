"""`lora-jax train --data FILE=WEIGHT --field KEY=COLUMN`: what the run would train on."""

import collections
import gzip
import itertools
import json
import pathlib

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.cli.jobs.training.stream import choose_streaming
from lora_jax.cli.train_options import TrainOptions
from lora_jax.training import log
from lora_jax.training.errors import DataError
from tests.cli.train.command import jsonl
from tests.cli.train.options.reading import read, text_of
from tests.training.rows.test_arrow import DICT


@pytest.fixture
def folder(tmp_path):
    """Return a directory of two files, of 12 questions each."""
    for name in "ab":
        rows = [{"q": f"{name}{n}?", "r": f"{name}!"} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


FIELDS = ["prompt=q", "completion=r"]


def seen(data, batches):
    """Count the texts of each file in some batches."""
    count = collections.Counter()
    for batch in itertools.islice(data.batches_from(1, 0, 0), batches):
        row = {name: x[0] for name, x in batch.items()}
        text, predicted = text_of(row)
        count.update(text[i + 1] for i, letter in enumerate(text) if letter == "?")
        assert predicted.replace("a!", "").replace("b!", "") == ""  # only the completions
    return count


@pytest.mark.parametrize("stream", [False, True])
def test_weights_and_fields(stream, folder):
    """Two epochs visit a four times and b once; `length` leaves one text per row."""
    data = [f"{folder}/a.jsonl=2", f"{folder}/b.jsonl=0.5"]
    task = read(data, folder, length=7, batch=1, stream=stream, field=FIELDS)
    if not stream:
        assert task.data.visited == 30 and len(task.data) == 24
    assert seen(task.data, 60) == {"a": 48, "b": 12}
    plain = read(
        [folder / "a.jsonl", folder / "b.jsonl"], folder, length=7, stream=stream, field=FIELDS
    )
    assert plain.data.checksum() != task.data.checksum()


def test_the_same_rows_are_held_out_with_weights(folder):
    names = [folder / "a.jsonl", folder / "b.jsonl"]
    one, other = (
        read(data, eval_split=0.25, field=FIELDS, length=7)
        for data in (names, [f"{names[0]}=3", names[1]])
    )
    assert len(one.held_out) == 6 and one.held_out.checksum() == other.held_out.checksum()
    assert len(one.data) == len(other.data) == 18
    (folder / "one.jsonl").write_text('{"q": "x?", "r": "x"}\n')
    with pytest.raises(DataError, match=r"--eval-split leaves no row of .*one\.jsonl to train on"):
        for seed in range(30):
            read([f"{folder}/one.jsonl=2", names[0]], eval_split=0.5, field=FIELDS, seed=seed)


def test_texts_with_weights(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 40)
    (tmp_path / "b.txt").write_text("b" * 40)
    task = read([f"{tmp_path}/a.txt=3", tmp_path / "b.txt"], length=10, shuffle=False)
    rows = [
        text_of({n: x[0] for n, x in batch.items()})[1]
        for batch in itertools.islice(task.data.batches_from(1, None, 0), 16)
    ]
    assert [text[0] for text in rows] == ["a"] * 12 + ["b"] * 4


def test_the_splits_of_a_directory_of_datasets():
    pytest.importorskip("pyarrow")
    fields = ["prompt=question", "completion=answer"]
    task = read([DICT], held_out=[DICT], field=fields, length=40)
    said = lambda data: "".join(
        text_of({n: x[i] for n, x in data.arrays.items()})[1] for i in range(len(data))
    )
    assert sorted(said(task.data).split("é")[1:]) == [*"0123456"] and said(task.held_out) == "out"


def test_files_of_other_splits_are_not_trained_on(tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    task = read([tmp_path], held_out=[tmp_path])
    names = ", ".join(str(tmp_path / f"{name}.jsonl") for name in ("test", "valid"))
    assert task.notes == (f"not trained on, as their names tell other splits: {names}",)
    said = [
        text_of({n: x[0] for n, x in data.arrays.items()})[0] for data in (task.data, task.held_out)
    ]
    assert said == ["train", "valid"]


def test_compressed_data_is_what_it_was(tmp_path, monkeypatch):
    """Read at first or streamed: the batches are those of the file that was compressed."""
    monkeypatch.setattr("lora_jax.cli.jobs.training.stream.LARGE", 10)
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "abc {n}"}}\n' for n in range(40)))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress((tmp_path / "d.jsonl").read_bytes()))
    options = lambda name: TrainOptions("tiny", [tmp_path / name], pathlib.Path("out"))
    assert choose_streaming(options("d.jsonl"), False).stream is True
    assert choose_streaming(options("d.jsonl.gz"), False).stream is True
    one, other = (read([tmp_path / f"d.jsonl{end}"]) for end in ("", ".gz"))
    assert one.data.checksum() == other.data.checksum()
    paths = [tmp_path / f"d.jsonl{end}" for end in ("", ".gz")]
    one, other = (read([path], tmp_path, stream=True).data for path in paths)
    assert one.checksum() == other.checksum()
    batches = [data.batches_from(2, 3, 1) for data in (one, other)]
    for _ in range(5):
        np.testing.assert_array_equal(*(next(batch)["ids"] for batch in batches))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n{"txt": 1}\n'))
    with pytest.raises(DataError, match=r"/d\.jsonl\.gz: 1 bad row; .*\n *line 2"):
        read([tmp_path / "d.jsonl.gz"], stream=True).data.example(2)
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"text\na\n" * 50)[:-20])
    with pytest.raises(DataError, match=r"/d\.csv\.gz: is not a whole \.gz file"):
        read([tmp_path / "d.csv.gz"], stream=True)


def test_preferences_that_are_streamed_are_those_of_the_file(tmp_path):
    """Each pair once per epoch, whatever the parts of the file; each row has as many slots."""
    path = jsonl(tmp_path / "pairs.jsonl", "preference", count=60)
    found = []
    for stream in (False, True):
        data = read([path], tmp_path, task="orpo", stream=stream).data
        epoch = itertools.islice(data.batches_from(1, 0, 0), data.steps_per_epoch(1) + 1)
        pairs = []
        for batch in epoch:
            ids, segments, weights = (batch[n][0] for n in ("ids", "segments", "weights"))
            assert segments.max() <= batch["pairs"].shape[1]
            assert batch["pairs"].sum() == segments.max()
            for number in range(1, segments.max() + 1):
                there = segments == number
                pairs.append((ids[there].tobytes(), weights[there].tobytes()))
        found.append(pairs)
    assert {*found[0]} == {*found[1]} and len({*found[0]}) == 60
    assert len(data.example(2)["pairs"][0]) == 64


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (("--field", "text"), "--field text: write KEY=COLUMN"),
        (("--data", "b.jsonl=0"), "b.jsonl=0: a weight must be above 0"),
    ],
)
def test_mistakes(more, error, folder, fails):
    words = ("train", "--model", "tiny", "--data", folder / "a.jsonl", "--out", folder / "out")
    assert error in fails(*words, *more) and not (folder / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_a_resumed_run_with_weights_is_exact(stream, folder, run):
    """A run of 3 and 6 more steps, over the end of an epoch, is a run of 9."""
    data = ("--data", f"{folder}/a.jsonl=2", "--data", f"{folder}/b.jsonl=0.5", stream)
    more = [*data, "--field", FIELDS[0], "--field", FIELDS[1], "--length", 7, "--batch", 5]
    more += ["--rank", 2, "--schedule", "constant", "--warmup", 0, "--save-every", 1]
    one, whole = folder / "one", folder / "whole"
    for out, steps, resume in ((one, 3, ()), (one, 9, ("--resume",)), (whole, 9, ())):
        done = run("train", "--model", "tiny", *more, "--out", out, "--steps", steps, *resume)
        assert done.status == 0, done.err
    name = "adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (whole / name).read_bytes()
    records = [[*map(log.without_speed, log.read(out / "log.jsonl"))] for out in (one, whole)]
    assert records[0] == records[1] and len(records[0]) == 9
    other = run(
        "train", "--model", "tiny", *more, "--out", one, "--resume", "--data", f"{folder}/a.jsonl"
    )
    assert other.status == 1 and "the training data is different" in other.err
