"""The suite is stricter than users are: several devices, no implicit rank promotion."""

import os

import jaxlib

# For four devices, and for compiling small programs: one module each, XLA's plain emitters
# (newer jaxlibs have no others). LORA_JAX_OPTIMIZE=1 compiles everything as users do.
OPTIMIZE = os.environ.get("LORA_JAX_OPTIMIZE", "") not in ("", "0")
FLAGS = {"--xla_force_host_platform_device_count": "4"}
if not OPTIMIZE:
    FLAGS["--xla_cpu_parallel_codegen_split_count"] = "1"
    if jaxlib.version.__version_info__ < (0, 11):
        FLAGS["--xla_cpu_use_fusion_emitters"] = "false"

given = os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [given, *(f"{name}={value}" for name, value in FLAGS.items() if name not in given)]
).strip()

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", not OPTIMIZE)

hypothesis.settings.register_profile("lora_jax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lora_jax")


@pytest.fixture
def strict():
    """No implicit dtype promotion; optax.adam and a bfloat16 nn.LayerNorm do not stand it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def quick_compile():
    yield


@pytest.fixture
def optimized():
    """Programs compiled as users compile them: for tests of FLOPs, memory and equal bits."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", not OPTIMIZE)


@pytest.fixture
def x64():
    """64-bit types within one test."""
    with jax.enable_x64(True):
        yield
