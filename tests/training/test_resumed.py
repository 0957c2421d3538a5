"""Orbax stores adapters, optimizer state, step and keys as they are; a resumed run is the same."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.training import resumed


def bits(x):
    return np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["split", "joined"])
def test_interrupted_and_resumed_in_another_process(form, tmp_path):
    frozen, tx, state = resumed.start(form)
    run = list(resumed.losses(frozen, tx, state, 6))
    whole = [loss for _, loss in run]
    assert len(set(whole)) == 6
    half = run[2][0]
    with resumed.manager(tmp_path / "run") as checkpoints:
        checkpoints.save(3, args=ocp.args.StandardSave(half))
    back = resumed.restore(tmp_path / "run", state)
    assert jax.tree.structure(back) == jax.tree.structure(half)
    for got, want in zip(jax.tree.leaves(back), jax.tree.leaves(half), strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert bits(got).tobytes() == bits(want).tobytes()
    assert {x.dtype.name for x in jax.tree.leaves(back)} >= {"bfloat16", "float32", "key<fry>"}
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.training.resumed",
        form,
        tmp_path / "run",
        "6",
    ]
    folder = Path(__file__).parents[2]
    other = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert other.stderr == "" and other.returncode == 0, other.stderr
    assert other.stdout.split() == whole[3:]
