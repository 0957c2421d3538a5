"""Adapters and models whose arrays span processes, in every format's files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.training.checkpoints import Checkpoints
from tests.processes import programs
from tests.processes.cluster import run_function
from tests.processes.made import model_and_adapters


def contents(folder):
    """What the files in a folder hold, by name; metadata has no order in safetensors."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else -8
        header = json.loads(data[8 : 8 + length]) if length > 0 else None
        found[str(path.relative_to(folder))] = header, data[8 + length :]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes, devices", [(2, 2), (2, 4), (4, 1)])
def test_files_are_those_of_one_process(tmp_path, processes, devices):
    """To the byte, from arrays that no process has whole; every process loads them."""
    run_function("save_everything", processes, devices, tmp_path)
    for scan in (False, True):
        model, adapters = model_and_adapters(scan)
        alone = tmp_path / f"alone-{scan}"
        programs.write(alone, model, adapters)
        expected = contents(alone)
        assert len(expected) == 7 and contents(tmp_path / "files" / f"scan={scan}") == expected


@pytest.mark.slow
def test_a_failure_to_write_reaches_all(tmp_path):
    run_function("fail_to_write", 2, 2, tmp_path)
    assert not (tmp_path / "files" / "bad").exists()


@pytest.mark.slow
def test_what_lies_in_one_process_is_saved_by_it_alone(tmp_path):
    run_function("save_locally", 2, 1, tmp_path)
    model, adapters = model_and_adapters()
    programs.write(tmp_path / "alone", model, adapters)
    assert contents(tmp_path / "files") == contents(tmp_path / "alone")


@pytest.mark.slow
def test_checkpoints_of_all_processes(tmp_path):
    """Saved by all of them and restored on another mesh, and by one process."""
    run_function("checkpoint", 2, 4, tmp_path)
    _, adapters = model_and_adapters()
    state = {"adapters": jax.device_put(adapters), "count": jnp.int32(0), "np": np.zeros(3)}
    with Checkpoints(tmp_path / "files" / "checkpoints") as checkpoints:
        step, found = checkpoints.restore(state)
    assert step == found["count"] == 3
    jax.tree.map(np.testing.assert_array_equal, found["adapters"], adapters)


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_write(tmp_path):
    run_function("refuse_checkpoint", 2, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["agree", "fail_at_the_end"])
def test_processes_agree(tmp_path, name):
    run_function(name, 2, 2, tmp_path)
