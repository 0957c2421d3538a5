"""The fuzzer of `lora-jax train` sees what is wrong with the end of a run."""

import random
from pathlib import Path

import pytest

pytest.importorskip("typer")

from tests.stress.train_options import check, configs, options, world

FINE = "error: d.jsonl: 1 bad row; fix or remove them\n"


@pytest.mark.parametrize(
    ("status", "err", "left", "problem"),
    [
        (1, FINE, [], None),
        (1, f"note: x\n{FINE}", [], None),
        (1, "Traceback (most recent call last)\n", [], "0 lines of error"),
        (1, FINE * 2, [], "2 lines of error"),
        (1, "error: unexpected KeyError: 1; this is a bug in lora-jax, d.jsonl\n", [], "foreseen"),
        (1, "error: it did not work\n", [], "names neither"),
        (3, FINE, [], "status 3"),
        (1, FINE, ["adapter.safetensors"], "fails and leaves"),
        (0, "", [], "succeeds without an adapter"),
        (0, "", ["adapter.safetensors"], "cannot be read"),
    ],
)
def test_the_judge(status, err, left, problem, tmp_path):
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    ended = check.Ended(("train", "--data", "d.jsonl"), status, "", err)
    found = check.problems(ended, tmp_path)
    assert (found == []) if problem is None else any(problem in one for one in found)


def test_the_same_numbers_draw_the_same_runs():
    def drawn(seed):
        draw = random.Random(seed)
        words = options.draw_words(draw)
        return words, configs.as_file(draw, words), world.odd_file(draw, "chat", "x")

    assert drawn(5) == drawn(5) != drawn(6)
    assert not Path("x.jsonl").exists()
