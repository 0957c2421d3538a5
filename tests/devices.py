"""Where the suite runs: on CPU devices, or with LORA_JAX_ACCELERATOR=1 on what JAX finds.

`make test-accelerator` sets it. There, products are summed in another order and kernels bring
workspaces; the tolerances below are those that the number format allows, and on a CPU they are
none.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ON_ACCELERATOR = os.environ.get("LORA_JAX_ACCELERATOR") == "1"
_make_mesh = jax.make_mesh


def some(count: int) -> list[jax.Device]:
    """Return the first devices; a test, or a whole module, is skipped where there are fewer."""
    found = jax.devices()
    if len(found) < count:
        if not ON_ACCELERATOR:  # there the suite itself asks for eight
            raise ValueError(f"{count} devices are needed, and there are {len(found)}")
        text = f"needs {count} devices; there is {len(found)}"
        pytest.skip(text, allow_module_level=True)
    return found[:count]


def make_mesh(axis_shapes, *args, **kwargs):
    """Return `jax.make_mesh`, after skipping a test that needs more devices than there are."""
    some(int(np.prod(axis_shapes)))
    return _make_mesh(axis_shapes, *args, **kwargs)


def assert_same(got, want, rounding=4):
    """Assert equality to the bit; on an accelerator, to a few roundings of the largest number."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype and got.shape == want.shape
    if not ON_ACCELERATOR or not jnp.issubdtype(got.dtype, jnp.inexact):
        np.testing.assert_array_equal(got, want)
        return
    error = rounding * float(jnp.finfo(want.dtype).eps)
    got, want = got.astype(np.float64), want.astype(np.float64)
    largest = max(1.0, np.abs(want).max(initial=0))
    np.testing.assert_allclose(got, want, rtol=0, atol=error * largest)


def temporary_bytes(compiled) -> int:
    """Return the temporary memory of a program, without the workspace of cuBLAS.

    XLA gives each of its calls some MiB, whatever the shapes are, and reuses them.
    """
    return compiled.memory_analysis().temp_size_in_bytes - workspace(compiled.as_text())


def workspace(text: str) -> int:
    """Return the largest workspace of a cuBLAS call in a program's text, 0 without one.

    >>> workspace('%x = (f32[8,8]{1,0}, s8[4194304]{0}) custom-call(%a, %b), '
    ...           'custom_call_target="__cublas$lt$matmul"')
    4194304
    """
    calls = [line for line in text.splitlines() if '"__cublas' in line]
    return max((int(n) for line in calls for n in re.findall(r"\bs8\[(\d+)\]", line)), default=0)
