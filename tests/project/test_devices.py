"""The suite's own measures on an accelerator: what it skips there, and what it lets pass."""

import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests import devices

TESTS = """
import jax, pytest
from tests import devices

def test_two(): jax.make_mesh((2,), ("x",))
def test_one(): assert jax.make_mesh((1,), ("x",)).size == 1 and jax.device_count() == 1
@pytest.mark.cpu("its own forms")
def test_cpu(): assert False
"""


@pytest.mark.slow  # another process
def test_what_one_device_cannot_run_is_skipped_with_a_word(tmp_path, monkeypatch):
    path = pathlib.Path(devices.__file__).with_name("test_of_an_accelerator.py")
    monkeypatch.setenv("LORA_JAX_ACCELERATOR", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    path.write_text(TESTS)
    try:
        words = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", path]
        said = subprocess.run(words, capture_output=True, text=True).stdout
    finally:
        path.unlink()
    assert "1 passed, 2 skipped" in said, said
    assert "needs 2 devices; there is 1" in said and "on a CPU alone: its own forms" in said


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_few_roundings_pass_on_an_accelerator_alone(dtype, monkeypatch):
    want = np.asarray([3.0, -1.0], dtype)
    eps = float(jnp.finfo(dtype).eps)
    near, far = ((want.astype(np.float64) * (1 + n * eps)).astype(dtype) for n in (1, 8))
    with pytest.raises(AssertionError):
        devices.assert_same(near, want)
    monkeypatch.setattr(devices, "ON_ACCELERATOR", True)
    devices.assert_same(near, want)
    for wrong in (far, near.astype(np.float16), near[:1]):
        with pytest.raises(AssertionError):
            devices.assert_same(wrong, want)
