"""`lora-jax train --task dpo` in two processes: the run of one device, resumed on another mesh."""

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.cli import main
from lora_jax.files.disk import safetensors_file
from tests.cli.train.command import jsonl, words
from tests.processes.cluster import train
from tests.processes.test_train import SECONDS, assert_same_run, files

STEPS = ("--task", "dpo", "--batch", 4, "--eval-split", 0.25, "--warmup", 0)
MORE = ("--schedule", "constant", "--dropout", 0.1)


@pytest.mark.slow
def test_the_run_is_that_of_one_device(tmp_path):
    """Process 0 alone writes the reference, and a run on another mesh reads it."""
    data = jsonl(tmp_path / "pairs.jsonl", "preference", count=24)
    out, alone = tmp_path / "out", tmp_path / "alone"
    assert main(words(data, alone, *STEPS, *MORE, "--steps", 4)) == 0
    reference = safetensors_file.read(alone / "reference.safetensors")[0]
    first = words(data, out, *STEPS, *MORE, "--steps", 4, "--save-every", 2, "--mesh", "data=2")
    with train(first, 2, 1, tmp_path / "first") as cluster:
        ended = cluster.wait(SECONDS)
    assert [one.status for one in ended] == [0, 0], cluster.output()
    assert_same_run(out, alone)
    assert files(out) == files(alone)
    for name, x in safetensors_file.read(out / "reference.safetensors")[0].items():
        np.testing.assert_allclose(x, reference[name], rtol=1e-5)
    before = (out / "reference.safetensors").read_bytes()
    rest = words(data, out, *STEPS, *MORE, "--steps", 6, "--resume", "--mesh", "fsdp=4")
    with train(rest, 2, 2, tmp_path / "rest") as cluster:
        ended = cluster.wait(SECONDS)
    assert [one.status for one in ended] == [0, 0], cluster.output()
    assert "reference" not in ended[0].err
    assert (out / "reference.safetensors").read_bytes() == before
