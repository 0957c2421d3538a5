"""Whatever `train` does with an option, a run of `sweep` does: the same losses and adapter."""

import json

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.files.disk import safetensors_file
from lora_jax.training import log
from tests.cli import files
from tests.cli.sweep.command import of_run, words
from tests.cli.sweep.test_sweep import EVAL, assert_is_that_of_train

#: A name -> the lists of a sweep, the name of one run, the options of train for it, and those of
#: both.
CASES = {
    "seeds": ("--seeds 3,4 --ranks 2", "rank2-lr2e-4-seed4", "--seed 4 --rank 2", ""),
    "dropout": (
        "--dropouts 0,0.3 --seeds 7",
        "rank8-lr2e-4-dropout0.3",
        "--dropout 0.3 --seed 7",
        "",
    ),
    "alpha": ("--alphas 4,32 --lrs 1e-2", "rank8-lr0.01-alpha32", "--alpha 32 --lr 1e-2", ""),
    "decay": (
        "--weight-decays 0,2 --lrs 1e-1 --slots 1",
        "rank8-lr0.1-decay2",
        "--weight-decay 2 --lr 1e-1",
        "--clip 0.05",
    ),
    "micro-batches": ("--lrs 1e-1,1e-2", "rank8-lr0.1", "--lr 1e-1", "--accumulate 3 --clip 0"),
    "dora": ("--ranks 1,3 --lrs 1e-2", "rank1-lr0.01", "--rank 1 --lr 1e-2", "--dora --rslora"),
    "all linear": (
        "--ranks 2,4 --lrs 1e-2",
        "rank2-lr0.01",
        "--rank 2 --lr 1e-2",
        "--targets all-linear --lora-plus 8 --init orthogonal --no-shuffle",
    ),
    "head": (
        "--ranks 2,4 --lrs 1e-2",
        "rank4-lr0.01",
        "--rank 4 --lr 1e-2",
        "--targets q_proj,embed_tokens --train norm --remat full --scan --schedule constant",
    ),
    "codes": ("--ranks 2,4 --lrs 1e-2", "rank2-lr0.01", "--rank 2 --lr 1e-2", "--quantize nf4"),
    "lion": ("--ranks 2,4 --lrs 1e-3", "rank2-lr1e-3", "--rank 2 --lr 1e-3", "--optimizer lion"),
    "muon": (
        "--lrs 1e-2,1e-3 --weight-decays 0,0.5",
        "rank8-lr0.01-decay0.5",
        "--lr 1e-2 --weight-decay 0.5",
        "--optimizer muon --lora-plus 2 --last-layers 1",
    ),
    "adafactor": ("--lrs 1e-2,1e-3", "rank8-lr0.01", "--lr 1e-2", "--optimizer adafactor"),
    "lora-rite": (
        "--ranks 2,4 --lrs 1e-3",
        "rank2-lr1e-3",
        "--rank 2 --lr 1e-3",
        "--optimizer lora-rite",
    ),
    "stream": (
        "--ranks 2,4 --lrs 1e-2 --slots 1",
        "rank4-lr0.01",
        "--rank 4 --lr 1e-2",
        "--stream",
    ),
    "tokens": (
        "--ranks 2,4 --lrs 1e-2",
        "rank4-lr0.01",
        "--rank 4 --lr 1e-2",
        "--add-token <new> --untie-head",
    ),
    "halving": (
        "--ranks 2,4,8 --lrs 1e-2,1e-3 --slots 2 --halving --eta 2",
        "rank8-lr0.01",
        "--rank 8 --lr 1e-2",
        "",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_that_of_train(case, play, tmp_path, run):
    lists, name, single, both = CASES[case]
    more = [*EVAL, "--steps", 6, *both.split()]
    done = run(*words(play, tmp_path / "all", *lists.split(), *more))
    assert done.status == 0, done.err
    alone = run(*words(play, tmp_path / "one", *single.split(), *more, command="train"))
    assert alone.status == 0, alone.err
    assert_is_that_of_train(tmp_path / "all", name, tmp_path / "one")


@pytest.mark.slow
def test_classifiers(tmp_path, run, fails):
    """An encoder with a new head; the table has the accuracy."""
    files.encoder(tmp_path / "encoder")
    texts = [{"text": "ab"[i % 2] * (1 + i % 5), "label": i % 2} for i in range(40)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in texts))
    given = ("--model", tmp_path / "encoder", "--task", "classification", "--data", data)
    given += ("--eval-split", 0.25, "--steps", 4, "--length", 64)
    done = run("sweep", *given, "--ranks", 2, "--lrs", "1e-2,1e-1", "--out", tmp_path / "all")
    assert done.status == 0, done.err
    assert "accuracy" in done.out and "next: lora-jax predict" in done.out
    more = ("--rank", 2, "--lr", "1e-2", "--out", tmp_path / "one")
    assert run("train", *given, *more).status == 0
    alone = log.read(tmp_path / "one" / "log.jsonl")
    for key in ("loss", "accuracy"):
        want = [r[key] for r in alone if "loss" in r]
        np.testing.assert_allclose(of_run(tmp_path / "all", "rank2-lr0.01", key), want, rtol=3e-6)
    mine, its = (
        safetensors_file.read(path / "adapter.safetensors")[0]
        for path in (tmp_path / "all" / "rank2-lr0.01", tmp_path / "one")
    )
    assert mine.keys() == its.keys()
    for name, x in its.items():
        assert np.linalg.norm(mine[name] - x) <= 1e-5 * np.linalg.norm(x), name
    error = fails("sweep", *given, "--seeds", "1,2", "--out", tmp_path / "other", status=2)
    assert "'--seeds': a classifier's new head is part of the base" in error
