"""`lora-jax train --mesh`: the losses of one device, resumed on another mesh; clear refusals."""

import jax
import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.files.disk import safetensors_file
from lora_jax.training import log, loop
from tests.cli.train.command import words

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


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 devices")
def test_losses_are_those_of_one_device(one_device, play, tmp_path, run, monkeypatch):
    """On another mesh for every part of the run; each part compiles its step once."""
    made = []
    make = loop.make_step
    monkeypatch.setattr(loop, "make_step", lambda *given: made.append(make(*given)) or made[-1])
    out = tmp_path / "out"
    for mesh, steps in (("fsdp=4,tensor=2", 2), ("tensor=4,data=2", 4)):
        more = ("--mesh", mesh, "--steps", steps, *(["--resume"] if made else []))
        done = run(*words(play, out, *STEPS, *MORE, *more))
        assert done.status == 0, done.err
        assert "mesh fsdp=4,tensor=2: 8 devices\n" in done.err or steps == 4
    assert "mesh data=2,tensor=4: 8 devices\n" in done.err
    assert "note: tensor=4 does not divide 2 key value heads: these weights are" in done.err
    assert [step._cache_size() for step in made] == [1, 1]
    rows = log.read(out / "log.jsonl")
    last = {r["step"]: r["loss"] for r in rows if "loss" in r}
    expected = {r["step"]: r["loss"] for r in log.read(one_device / "log.jsonl") if "loss" in r}
    assert last.keys() == expected.keys()
    np.testing.assert_allclose(list(last.values()), list(expected.values()), rtol=2e-6)
    for name, x in adapter(one_device).items():
        np.testing.assert_allclose(adapter(out)[name], x, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "mesh, message",
    [
        ("fsdp=4,tensr=2", "--mesh: unknown axis 'tensr'; did you mean tensor"),
        ("fsdp=4,fsdp=2", "--mesh: the axis fsdp is given twice"),
        ("fsdp", "--mesh: 'fsdp' is not an axis and its number of devices; write it like fsdp=4"),
        ("fsdp=0", "--mesh: 'fsdp=0' is not an axis and its number"),
        ("fsdp=-8", "--mesh: 'fsdp=-8' is not an axis and its number"),
        ("", "--mesh: '' is not an axis and its number of devices"),
        ("fsdp=2", "--mesh fsdp=2 is of 2 devices, but there are 8; use all of them"),
        (
            "data=2,fsdp=4",
            "--batch 2: the rows cannot be divided over data=2 × fsdp=4; use --batch 8",
        ),
    ],
)
def test_a_mesh_is_refused(play, tmp_path, fails, mesh, message):
    assert message in fails(*words(play, tmp_path / "out", "--mesh", mesh))
    assert not (tmp_path / "out").exists()


def test_options_of_processes_go_together(play, tmp_path, fails):
    given = words(play, tmp_path / "out", "--coordinator", "127.0.0.1:1")
    error = fails(*given, status=2)
    assert "go together; add --processes and --process-id" in error
    error = fails(*given, "--processes", 2, "--process-id", 2, status=2)
    assert "--process-id" in error and "must be below --processes 2" in error
