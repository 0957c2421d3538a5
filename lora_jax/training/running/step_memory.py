"""The memory that a training step needs, by the compiler, and the memory that there is."""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.training.loop import Job
from lora_jax.training.step import init_state, make_step

#: The part that a step may take: the rest is for the next batch, the program, and on a CPU for the
#: host's own needs.
OF_DEVICE, OF_MACHINE = 0.95, 0.8
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def needed_bytes(job: Job, adapters: Any) -> int:
    """Compile a job's step, and return the bytes that it needs on each device: all its arrays.

    Raises:
      NotImplementedError: the compiler reports no memory sizes.
    """
    settings = job.settings
    batch = job.place(job.data.example(settings.rows * settings.accumulate))
    state = init_state(adapters, job.tx)
    options = (settings.accumulate, settings.seed, state, settings.merge_aware)
    return bytes_of(make_step(job.loss, job.tx, *options), state, job.base, batch, np.int32(0))


def bytes_of(step: Any, *args: Any) -> int:
    """Compile a jitted function for these arguments, and return the bytes that it needs.

    Raises:
      NotImplementedError: the compiler reports no memory sizes.
    """
    found = step.lower(*args).compile().memory_analysis()
    if found is None:
        raise NotImplementedError("this backend's compiler reports no memory sizes")
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + outputs


def available_bytes() -> int:
    """Return the bytes of each device that a step may take."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(OF_DEVICE * stats["bytes_limit"])
    return int(OF_MACHINE * _machine_bytes() / len(jax.local_devices()))


def widened_bytes(base: Any) -> int:
    """Return the bytes of the float32 copies that a step keeps of narrower weights.

    A CPU may compute products in float32. XLA then widens a weight once for the forward and the
    backward pass, a stacked one whole. Other devices keep no copies.
    """
    if jax.default_backend() != "cpu":
        return 0
    narrow = (jnp.bfloat16, jnp.float16)
    matrices = [x for x in jax.tree.leaves(base) if x.ndim > 1 and x.dtype in narrow]
    return sum(4 * x.size for x in matrices if is_widened(jnp.dtype(x.dtype)))


@functools.cache
def is_widened(dtype: np.dtype) -> bool:
    """Return whether XLA copies a matrix of this dtype to float32: some versions and CPUs do."""
    x, w = jax.ShapeDtypeStruct((64, 256), dtype), jax.ShapeDtypeStruct((256, 256), dtype)
    found = jax.jit(lambda x, w: jnp.tanh(x @ w)).lower(x, w).compile().memory_analysis()
    return found is not None and found.temp_size_in_bytes >= 4 * 256 * 256


def _machine_bytes() -> int:
    """Return the machine's memory, or what this process may have of it."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(machine, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return machine
