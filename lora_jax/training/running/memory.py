"""The most memory that a run has taken so far."""

import sys

import jax


def peak_bytes() -> int | None:
    """Return the highest use of memory so far, in bytes.

    That is the device's own figure, of the fullest of this process's devices, or on a CPU, whose
    devices have none, the most memory that the process has had in RAM. None where neither is known.
    """
    found = [
        (device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()
    ]
    known = [x for x in found if x is not None]
    if known:
        return max(known)
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
