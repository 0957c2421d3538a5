"""`lora-jax train --quantize`: the run, its record and its adapter."""

import dataclasses
import json

import numpy as np
import pytest

import lora_jax as lora
from lora_jax import models
from lora_jax.core.paths import flatten_with_paths
from lora_jax.core.quantized.weight import is_quantized
from tests.cli.train.command import SMALL

pytestmark = pytest.mark.usefixtures("quick_compile")


def logged(directory, name):
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


TRAIN = ("train", *SMALL, "--scan", "--schedule", "constant", "--warmup", 0)


def test_a_run_records_its_kind_and_its_adapter_merges(model, run, fails, play, tmp_path):
    train = (*TRAIN, "--data", play, "--model", model, "--out", tmp_path / "run", "--quantize")
    done = run(*train, "int4", "--steps", 1)
    assert done.status == 0, done
    assert "next: lora-jax generate" in done.out and "--quantize int4 --prompt" in done.out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["quantize"] == "int4"
    assert 'quantize was "int4", now "int8"' in fails(*train, "int8", "--resume", "--steps", 2)

    refused = fails(
        *TRAIN, "--data", play, "--model", model, "--out", "x", "--merge-aware", status=2
    )
    assert "--merge-aware is for --quantize" in refused

    # the adapter fits the float model too; merged into codes it loses most of its update
    adapter = ("--model", model, "--adapter", tmp_path / "run", "--out", tmp_path / "merged")
    merged = run("merge", *adapter, "--quantize", "int4")
    assert "4 merged weights in int4" in merged.out and "rounding error of the" in merged.out
    assert "int4 is too coarse for this update; train with --merge-aware" in merged.err
    kept, _ = flatten_with_paths(models.load(tmp_path / "merged", quantize="keep").params)
    assert sum(is_quantized(x) and x.kind == "int4" for x in kept.values()) == 14
    assert run("merge", *adapter, "--force").status == 0


@pytest.mark.slow
def test_what_merge_aware_training_trains_is_what_merge_writes(model, run, play, tmp_path):
    train = (*TRAIN, "--data", play, "--eval", play, "--model", model, "--out", tmp_path / "run")
    assert run(*train, "--quantize", "int4", "--merge-aware", "--steps", 3).status == 0
    adapter = ("--model", model, "--adapter", tmp_path / "run", "--out", tmp_path / "merged")
    assert run("merge", *adapter, "--quantize", "int4").status == 0
    given = ("--data", play, "--length", 32, "--json", "--quantize", "keep")
    merged = json.loads(run("eval", "--model", tmp_path / "merged", *given).out)
    trained = logged(tmp_path / "run", "eval_loss")[-1]
    np.testing.assert_allclose(merged["loss"], trained, rtol=1e-5)


@pytest.mark.slow
def test_training_on_codes_is_training_on_their_values(model, run, play, tmp_path):
    base = models.load(model, quantize="int4", scan=True)
    floats = dataclasses.replace(base, params=lora.dequantize(base.params))
    models.save(tmp_path / "floats", floats)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "floats" / name).write_bytes((model / name).read_bytes())
    train = (*TRAIN, "--data", play, "--model", model, "--out", tmp_path / "run")
    assert run(*train, "--quantize", "int4", "--steps", 1).status == 0
    assert run(*train, "--quantize", "int4", "--steps", 3, "--resume").status == 0
    plain = (*TRAIN, "--data", play, "--model", tmp_path / "floats", "--out", tmp_path / "plain")
    assert run(*plain, "--steps", 3).status == 0
    found, wanted = (logged(tmp_path / name, "loss") for name in ("run", "plain"))
    assert len(found) == 3
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert set(logged(tmp_path / "run", "flops")) == set(logged(tmp_path / "plain", "flops"))
