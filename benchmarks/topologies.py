"""Accelerators to compile for, without having one: what the topology of each is called.

A TPU needs `libtpu`, an H100 the CUDA plugin of jax (both are wheels of PyPI); neither needs a
device. `jax.experimental.topologies` gives compile-only devices: programs are compiled for them,
but cannot run.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

#: What XLA must know about a GPU that is not there (a TargetConfigProto).
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What its maker publishes about one device."""

    platform: str
    flops: float  # bfloat16 operations per second
    bandwidth: float  # bytes of its memory per second
    memory: float  # bytes


#: The first part of a topology's name -> the device.
CHIPS = {
    "v5e": Chip("tpu", 197e12, 819e9, 16 * 2**30),
    "v5p": Chip("tpu", 459e12, 2765e9, 95 * 2**30),
    "v6e": Chip("tpu", 918e12, 1640e9, 32 * 2**30),
    "h100": Chip("cuda", 989e12, 3352e9, 84.9e9),
    "cpu": Chip("cpu", float("nan"), float("nan"), float("inf")),
}


class Unavailable(Exception):
    """The compiler of a topology is not installed."""


def chip(topology: str) -> Chip:
    """Return the device of a topology such as "v5e:2x4".

    Raises:
      ValueError: it is none of `CHIPS`.
    """
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"--topology {topology}: {name} is none of {', '.join(CHIPS)}")
    return CHIPS[name]


def devices(topology: str) -> Sequence[jax.Device]:
    """Return the devices of a topology: "v5e:2x4", "v5p:2x2x1", "h100:8", or "cpu:4", which run.

    Raises:
      Unavailable: the compiler is not installed.
      ValueError: there is no such topology, or the process has too few CPU devices.
    """
    name, _, size = topology.partition(":")
    kind = chip(topology)
    if kind.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise Unavailable(f"{topology}: libtpu is not installed (pip install libtpu)")
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to ask for
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one to keep for oneself
        return topologies.get_topology_desc(topology, platform="tpu").devices
    count = int(size or 1)
    if kind.platform == "cuda":
        plugins = "jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"
        if not any(_is_installed(plugin) for plugin in plugins):
            raise Unavailable(f"{topology}: CUDA's plugin is not installed (jax-cuda12-plugin)")
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        # partitions x hosts x devices per host
        return topologies.get_topology_desc(
            name, platform="cuda", topology=f"1x1x{count}", target_config=H100
        ).devices
    if count > len(jax.devices("cpu")):
        raise ValueError(
            f"{topology}: there are {len(jax.devices('cpu'))} CPU devices; "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return jax.devices("cpu")[:count]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
