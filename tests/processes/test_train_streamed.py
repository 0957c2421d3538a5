"""`lora-jax train --stream` in two processes: each reads its share, and the run is that of one."""

import json

import pytest

pytest.importorskip("typer")

from lora_jax.training import log
from tests.cli.train.command import jsonl, words
from tests.processes.cluster import train
from tests.processes.test_train import SECONDS, assert_same_run

STEPS = ("--batch", 4, "--warmup", 0, "--schedule", "constant", "--log-every", 1, "--stream")


@pytest.mark.slow
def test_each_process_reads_its_share(tmp_path):
    """Also of a run that is continued by one process."""
    from lora_jax.cli import main

    data = jsonl(tmp_path / "d.jsonl", "text", count=200)
    out, alone = tmp_path / "out", tmp_path / "alone"
    given = words(data, out, *STEPS, "--steps", 4, "--mesh", "data=2")
    with train(given, 2, 1, tmp_path / "first") as cluster:
        ended = cluster.wait(SECONDS)
    assert [one.status for one in ended] == [0, 0], cluster.output()
    read = [
        {tuple(json.loads(line)[:3]) for line in (out / f"rows-{i}.jsonl").read_text().splitlines()}
        for i in range(2)
    ]
    assert {lane for lane, *_ in read[0]} == {0, 1} and {lane for lane, *_ in read[1]} == {2, 3}
    assert main(words(data, out, *STEPS, "--steps", 6, "--resume")) == 0
    assert main(words(data, alone, *STEPS, "--steps", 6)) == 0
    assert_same_run(out, alone)


@pytest.mark.slow
def test_a_damaged_row_that_one_process_reads_ends_both(tmp_path):
    """Each line on stderr names it; what was trained is saved."""
    data = tmp_path / "d.jsonl"
    lines = jsonl(data, "text", count=200).read_text().splitlines()
    lines[100] = lines[100][:-1]
    data.write_text("\n".join(lines))
    out = tmp_path / "out"
    given = words(data, out, *STEPS, "--steps", 400, "--mesh", "data=2")
    with train(given, 2, 1, tmp_path / "first") as cluster:
        ended = cluster.wait(SECONDS)
    assert [one.status for one in ended] == [1, 1], cluster.output()
    said = ended[0].err + ended[1].err
    assert "line 101: not valid JSON" in said and "Traceback" not in said and "nan" not in said
    done = max((r["step"] for r in log.read(out / "log.jsonl")), default=0)
    assert (out / "checkpoints" / str(done)).is_dir()
