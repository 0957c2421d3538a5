"""`lora-jax train --mesh`: the losses of one device, resumed on another mesh; clear refusals."""

import jax
import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.files.disk import safetensors_file
from lora_jax.training import log, loop
from tests.cli.train_command import words

STEPS = ("--batch", 4, "--accumulate", 2, "--steps", 4, "--dropout", 0.1, "--eval-split", 0.2)
MORE = ("--warmup", 0, "--schedule", "constant", "--lr", "3e-3")


def losses(out):
    return [r.get("loss", r.get("eval_loss")) for r in log.read(out / "log.jsonl")]


@pytest.fixture(scope="module")
def one_device(play, tmp_path_factory):
    from lora_jax.cli import main

    out = tmp_path_factory.mktemp("mesh") / "one"
    assert main(words(play, out, *STEPS, *MORE)) == 0
    return out


def adapter(out):
    return safetensors_file.read(out / "adapter" / "adapter_model.safetensors")[0]


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_losses_are_those_of_one_device(one_device, play, tmp_path, run, monkeypatch):
    """On another mesh for every part of the run; each part compiles its step once."""
    made = []
    make = loop.make_step
    monkeypatch.setattr(loop, "make_step", lambda *given: made.append(make(*given)) or made[-1])
    out = tmp_path / "out"
    for mesh, steps in (("fsdp=4,tensor=2", 2), ("tensor=4,data=2", 3), ("auto", 4)):
        more = ("--mesh", mesh, "--steps", steps, *(["--resume"] if made else []))
        done = run(*words(play, out, *STEPS, *MORE, *more))
        assert done.status == 0, done.err
        shown = {"tensor=4,data=2": "data=2,tensor=4", "auto": "fsdp=4,tensor=2"}.get(mesh, mesh)
        assert f"mesh {shown}: 8 devices" in done.err
    assert [step._cache_size() for step in made] == [1, 1, 1]
    rows = log.read(out / "log.jsonl")
    last = {r["step"]: r["loss"] for r in rows if "loss" in r}
    expected = {r["step"]: r["loss"] for r in log.read(one_device / "log.jsonl") if "loss" in r}
    assert last.keys() == expected.keys()
    np.testing.assert_allclose(list(last.values()), list(expected.values()), rtol=2e-6)
    for name, x in adapter(one_device).items():
        np.testing.assert_allclose(adapter(out)[name], x, rtol=1e-4, atol=1e-5, err_msg=name)
