"""Arrays that are kept in host memory, and the way to the device and back."""

from typing import Any

import jax


def on_device(x: Any) -> Any:
    """Return `x` in device memory: itself, unless it is kept in host memory."""
    return jax.device_put(x, jax.memory.Space.Device) if _is_on_host(x) else x


def in_memory_of(x: jax.Array, like: Any) -> jax.Array:
    """Return `x`, which is in device memory, in host memory if `like` is there."""
    return jax.device_put(x, jax.memory.Space.Host) if _is_on_host(like) else x


def _is_on_host(x: Any) -> bool:
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space is jax.memory.Space.Host
