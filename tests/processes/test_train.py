"""`lora-jax train` in several processes: the run of one device, whoever stops or fails."""

import json
import os
import random
import re
import signal

import numpy as np
import pytest

pytest.importorskip("typer")

from lora_jax.files.disk import safetensors_file
from lora_jax.training import log
from tests.cli.train.command import TEXT, jsonl, words
from tests.processes.cluster import Cluster, is_free, train

STEPS = ("--batch", 4, "--accumulate", 2, "--eval-split", 0.2, "--warmup", 0, "--log-every", 1)
MORE = ("--schedule", "constant", "--dropout", 0.1)
SECONDS = 150  # of a run that ends


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "play.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def run_alone():
    """Return a function that trains in this process, on one device."""
    from lora_jax.cli import main

    def call(given):
        assert main(given) == 0

    return call


@pytest.fixture(scope="module")
def alone(play, tmp_path_factory):
    """Return the directory of a run on one device."""
    from lora_jax.cli import main

    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(words(play, out, *STEPS, *MORE, "--steps", 6)) == 0
    return out


def values(out):
    """The log without times: a row for each step and evaluation."""
    names = ("step", "loss", "eval_loss", "gradient_norm", "tokens")
    records = log.read(out / "log.jsonl")
    return [(r["step"], "loss" in r) for r in records], [
        r[name] for r in records for name in names if name in r
    ]


def assert_same_run(out, other):
    """Within float32's rounding: devices sum in another order."""
    (names, found), (others, expected) = values(out), values(other)
    assert names == others
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    tensors = {
        place: safetensors_file.read(place / "adapter" / "adapter_model.safetensors")[0]
        for place in (out, other)
    }
    for name, x in tensors[other].items():
        np.testing.assert_allclose(tensors[out][name], x, rtol=1e-3, atol=1e-5, err_msg=name)


def files(out):
    return sorted(
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts
    )


def spoken(err):
    """Return the lines that are not from XLA's own log, such as "W1127 13:55:34.290083 ..."."""
    return [line for line in err.splitlines() if not re.match(r"[IWE]\d{4} \d\d:", line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, devices, mesh",
    [(2, 1, "data=2"), (2, 4, "fsdp=4,tensor=2"), (4, 2, "data=2,fsdp=2,tensor=2")],
)
def test_the_run_is_that_of_one_device(play, alone, tmp_path, processes, devices, mesh):
    """Resumed halfway on another mesh; process 0 alone writes and speaks."""
    out = tmp_path / "out"
    first = words(play, out, *STEPS, *MORE, "--steps", 3, "--mesh", mesh)
    with train(first, processes, devices, tmp_path / "first") as cluster:
        ended = cluster.wait(SECONDS)
    assert [one.status for one in ended] == [0] * processes, cluster.output()
    total = processes * devices
    assert f"mesh {mesh}: {total} devices in {processes} processes" in ended[0].err
    assert [spoken(one.err) for one in ended[1:]] == [[]] * (processes - 1)

    rest = words(play, out, *STEPS, *MORE, "--steps", 6, "--resume")
    with train(rest, 2, 2, tmp_path / "rest") as cluster:
        ended = cluster.wait(SECONDS)
    assert [one.status for one in ended] == [0, 0], cluster.output()
    assert "mesh fsdp=4: 4 devices in 2 processes" in ended[0].err
    evaluations = [(step, is_step) for step, is_step in values(out)[0] if not is_step]
    assert evaluations == [(0, False), (3, False), (6, False)]
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"step": 3, "eval_loss"' not in line]
    (out / "log.jsonl").write_text("".join(kept))
    assert_same_run(out, alone)
    assert files(out) == files(alone)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_ctrl_c_in_one_process_stops_all(play, alone, tmp_path, number):
    """After the same step, which is saved; the resumed run is the whole one."""
    out = tmp_path / "out"
    given = words(play, out, *STEPS, *MORE)
    with train([*given, "--steps", 10_000], 2, 2, tmp_path / "first") as cluster:
        cluster.wait_for("step 2 of", 0, SECONDS)
        os.kill(cluster.processes[number].pid, signal.SIGINT)
        ended = cluster.wait(60)
    assert [one.status for one in ended] == [130, 130], cluster.output()
    assert "is saved, with its adapter in" in ended[0].err.splitlines()[-1]
    assert "Traceback" not in ended[0].err + ended[1].err
    done = max(step for step, _ in values(out)[0])
    assert (out / "checkpoints" / str(done)).is_dir()


def one_line_errors(ended):
    """What the processes say in lines that begin with "error:"."""
    assert all("Traceback" not in one.err for one in ended), ended
    return [[line for line in one.err.splitlines() if line.startswith("error: ")] for one in ended]


@pytest.mark.slow
def test_a_directory_that_process_0_cannot_write(play, tmp_path):
    (tmp_path / "file").write_text("in the way")
    given = words(play, tmp_path / "file" / "out", *STEPS, "--steps", 2)
    with train(given, 2, 1, tmp_path / "logs") as cluster:
        ended = cluster.wait(60)
    errors = one_line_errors(ended)
    assert [one.status for one in ended] == [1, 1], cluster.output()
    assert len(errors[0]) == 1 and "file/out" in errors[0][0] and errors[1] == []


@pytest.mark.slow
def test_data_that_one_process_cannot_read(play, tmp_path):
    """Process 0 says it, and names the process."""
    out = tmp_path / "out"
    bad = jsonl(tmp_path / "bad.jsonl", "text")
    bad.write_text(bad.read_text() + "{not json\n")
    commands = []
    for number, data in enumerate((play, bad)):
        given = words(data, out, *STEPS, "--steps", 2, "--coordinator", "127.0.0.1:{port}")
        given += ["--processes", 2, "--process-id", number]
        commands.append(["-m", "lora_jax", *given])
    with Cluster(commands, 1, tmp_path / "logs") as cluster:
        ended = cluster.wait(60)
    errors = one_line_errors(ended)
    assert [one.status for one in ended] == [1, 1], cluster.output()
    assert len(errors[0]) == 1 and errors[1] == []
    assert "error: process 1: " in errors[0][0] and "bad.jsonl" in errors[0][0]
    assert not out.exists()


@pytest.mark.slow
def test_a_process_that_is_killed(play, tmp_path):
    """The others end too, and say that another one did."""
    given = words(play, tmp_path / "out", *STEPS, "--steps", 10_000)
    with train(given, 2, 1, tmp_path / "logs") as cluster:
        cluster.wait_for("step 2 of", 0, SECONDS)
        cluster.processes[1].kill()
        ended = cluster.wait(60)
    assert [one.status for one in ended] == [1, -9], cluster.output()
    (errors, _) = one_line_errors(ended)
    assert len(errors) == 1 and "another process" in errors[0], cluster.output()


@pytest.mark.slow
def test_slurm_is_found(play, tmp_path):
    """Without --coordinator, as `srun lora-jax train` runs it."""
    last = 2**16 - 2**12  # JAX takes a port above, by the job's number
    port = next(p for p in random.sample(range(last, 2**16), 50) if is_free(p))
    job = {
        "SLURM_JOB_ID": str(port - last),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
    }
    own = [job | dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID"), n) for n in "01"]
    given = words(play, tmp_path / "out", *STEPS, "--steps", 2, "--mesh", "tensor=2")
    with Cluster([["-m", "lora_jax", *given]] * 2, 1, tmp_path / "logs", own) as cluster:
        ended = cluster.wait(SECONDS)
    assert [one.status for one in ended] == [0, 0], cluster.output()
    assert "mesh tensor=2: 2 devices in 2 processes" in ended[0].err
    assert spoken(ended[1].err) == []


@pytest.mark.slow
def test_each_process_reads_its_own_rows(tmp_path, run_alone):
    """With --stream: the batches of one process, and no part of the files is read by two."""
    data = jsonl(tmp_path / "rows.jsonl", "text", 400)
    given = ["--stream", "--length", 32, "--batch", 2, "--steps", 4, "--save-every", 2]
    more = [*given, "--schedule", "constant", "--warmup", 0]
    alone, out = tmp_path / "alone", tmp_path / "out"
    run_alone(words(data, alone, *more))
    with train(words(data, out, *more, "--mesh", "data=2"), 2, 1, tmp_path / "logs") as cluster:
        ended = cluster.wait(SECONDS)
    assert [one.status for one in ended] == [0, 0], cluster.output()
    assert_same_run(out, alone)
    read = [
        {tuple(json.loads(line)[:3]) for line in (out / f"rows-{n}.jsonl").read_text().splitlines()}
        for n in range(2)
    ]
    assert all(read) and not read[0] & read[1]
    assert {lane for lane, _, _ in read[0]} == {0} and {lane for lane, _, _ in read[1]} == {1}
