"""Arrays that are kept in host memory, and the way to the device and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def on_device(x: Any) -> Any:
    """Return `x` in device memory: itself, unless it is kept in host memory."""
    return jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x


def in_memory_of(x: Any, like: Any) -> Any:
    """Return `x`, which is in device memory, in host memory if `like` is there."""
    return jax.device_put(x, jax.memory.Space.Host) if _is_on_host(like) else x


def fetch(x: Any, index: tuple[Any, ...] = ()) -> np.ndarray:
    """Return `x[index]` as NumPy, a view where a CPU has it.

    `np.asarray` would leave a copy of the whole array in `x`, for as long as `x` lives.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x)[index]
    devices = x.devices()
    if len(devices) == 1 and next(iter(devices)).platform == "cpu":
        return np.asarray(x)[index]
    return np.asarray(x[index] if index else jnp.copy(x))


def _is_on_host(x: Any) -> bool:
    arrays = [leaf for leaf in jax.tree.leaves(x) if isinstance(leaf, jax.Array)]
    return any(jax.typeof(leaf).memory_space is jax.memory.Space.Host for leaf in arrays)
