"""`lora-jax train --patience`, `--load-best`, `--val-batches` and `--mask-prompt`."""

import datetime
import pathlib

import pytest

pytest.importorskip("typer")

from lora_jax.cli.jobs.training.train import open_run
from lora_jax.cli.layers_option import parse_layers
from lora_jax.cli.train_options import TrainOptions
from lora_jax.training import log
from tests.cli.train.command import jsonl, words
from tests.cli.train.options.reading import read, text_of

EVAL = ("--eval-split", 0.25, "--val-batches", 1, "--eval-every", 1)


@pytest.mark.slow
def test_a_run_that_gets_worse_ends_with_its_best_adapter(play, tmp_path, run, quick_compile):
    """At such a rate nothing is learned after the first step."""
    out = tmp_path / "out"
    more = (*EVAL, "--patience", 2, "--load-best", "--lr", 9, "--warmup", 0)
    done = run(*words(play, out, *more, "--steps", 9))
    assert done.status == 0, done.err
    losses = [r["eval_loss"] for r in log.evaluations(log.read(out / "log.jsonl"))]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 and best < 7
    said = f"ended after step {best + 2} of 9: the held-out loss has not fallen in 2 evaluations"
    assert f"{said} (--patience)\n" in done.err
    lowest = f"the one with the lowest held-out loss, after step {best}"
    assert f"wrote {out / 'adapter'}: {lowest}\nwrote {out / 'best'}: {lowest}\n" in done.out
    names = {file.name for file in (out / "best").iterdir()}
    assert names == {file.name for file in (out / "adapter").iterdir()} and len(names) == 3
    card = (out / "adapter" / "README.md").read_text()
    assert f"| steps | {best} |\n" in card and f"| held-out loss | {min(losses):.4g} |\n" in card
    for name in names:
        assert (out / "adapter" / name).read_bytes() == (out / "best" / name).read_bytes()


@pytest.mark.parametrize(
    "more, error",
    [
        (("--patience", 1, "--eval-every", 1), "--patience needs held-out data; add --eval or"),
        (("--load-best",), "--load-best needs held-out data; add --eval or --eval-split"),
        (("--eval-split", 0.1, "--patience", 1), "--patience counts evaluations; add --eval-every"),
        (("--eval-rows", 3, "--val-batches", 1), "give either --eval-rows or --val-batches"),
        (("--layers", "-1", "--last-layers", 1), "give either --layers or --last-layers"),
        (("--task", "classification", "--no-mask-prompt"), "is for --task causal-lm"),
        (("--optimizer", "lora-rite", "--lora-plus", 4), "updates A and B together; leave out"),
        (("--report", "csv"), "Invalid value for '--report': 'csv' is not one of 'tensorboard',"),
        (("--optimizer", "adam"), "'adam' is not one of 'adamw', 'lion'"),
    ],
)
def test_what_needs_other_options(more, error, tmp_path, fails):
    assert error in fails(*words("a.txt", tmp_path / "out", *more), status=2)


def test_last_layers_are_in_the_model(play, tmp_path, fails):
    """The tiny model has two."""
    options = TrainOptions("tiny", [play], tmp_path, last_layers=1, length=8)
    found, model, _ = open_run(options, datetime.datetime.now(), print)
    layers = parse_layers(found.layers)
    assert [*range(model.config.num_hidden_layers)][layers] == [1]
    error = fails(*words(play, tmp_path / "out", "--last-layers", 3))
    assert "--last-layers 3: the model has 2 layers" in error


def test_batches_of_evaluation_are_so_many_rows():
    options = lambda **more: TrainOptions("m", [], pathlib.Path("o"), batch=6, **more)
    assert options(val_batches=3).most_eval_rows == 18
    assert options(eval_rows=5).most_eval_rows == 5 and options().most_eval_rows == 0


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_trained_on_if_asked_for(stream, tmp_path):
    """All but the first token, which nothing comes before."""
    data = [jsonl(tmp_path / "d.jsonl", "completion", count=30)]
    more = {"length": 13, "stream": stream, "shuffle": False}
    for mask, expected in ((True, " 1"), (False, " + 1 = 1")):
        task = read(data, tmp_path, **more, mask_prompt=mask)
        row = next(task.data.batches_from(1, None, 0))
        whole, predicted = text_of({name: x[0] for name, x in row.items()})
        assert (whole, predicted) == ("0 + 1 = 1", expected)
        assert row["weights"][0].sum() == len(expected) + 1  # and the end of the text
