"""The suite is stricter than users are: several devices, no implicit rank promotion."""

import gc
import os

os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # the user's own stays as it is

import hypothesis
import jax
import jaxlib
import pytest

from tests import devices
from tests.devices import ON_ACCELERATOR

# An accelerator's tests need the CPU too, for callbacks; and the processes that tests start need
# some of its memory.
if not ON_ACCELERATOR:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
elif "cpu" not in os.environ.get("JAX_PLATFORMS", "cpu"):
    os.environ["JAX_PLATFORMS"] += ",cpu"
if ON_ACCELERATOR:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS"))

# Nearly all of a test's time goes into compiling a program that runs once. So XLA compiles
# quickly, here and in the processes that tests start: few optimizations, one LLVM module per
# program and, where there is a choice, the emitters without MLIR. `make test-all`
# (LORA_JAX_OPTIMIZE=1) compiles as users do.
OPTIMIZE = os.environ.get("LORA_JAX_OPTIMIZE") == "1" or ON_ACCELERATOR
flags = {} if ON_ACCELERATOR else {"--xla_force_host_platform_device_count": "8"}
if not OPTIMIZE:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    flags["--xla_cpu_parallel_codegen_split_count"] = "1"
    if jaxlib.version.__version_info__ < (0, 11):  # XLA aborts on flags it does not know
        flags["--xla_cpu_use_fusion_emitters"] = "false"
given = os.environ.get("XLA_FLAGS", "")
added = [f"{name}={value}" for name, value in flags.items() if name not in given]
os.environ["XLA_FLAGS"] = " ".join([given, *added]).strip()

jax.config.update("jax_disable_most_optimizations", not OPTIMIZE)
jax.config.update("jax_numpy_rank_promotion", "raise")
if ON_ACCELERATOR:  # float32 products have fewer bits there otherwise
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.make_mesh = devices.make_mesh

hypothesis.settings.register_profile("lora_jax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lora_jax")

# Tracing makes many objects and hardly a circle; what is imported stays until the end.
gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items):
    for item in items if ON_ACCELERATOR else ():
        marker = item.get_closest_marker("cpu")
        if marker:
            item.add_marker(pytest.mark.skip(reason=f"on a CPU alone: {marker.args[0]}"))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


@pytest.fixture
def strict():
    """No implicit dtype promotion; optax.adam and a bfloat16 nn.LayerNorm do not stand it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def quick_compile():
    """Many small programs, whose compiling is most of the time: quickly in test-all too."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", not OPTIMIZE)


@pytest.fixture
def optimized():
    """Compiled as users compile: FLOPs, memory, and results that are equal to the bit."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", not OPTIMIZE)


@pytest.fixture
def x64():
    """64-bit types within one test."""
    if jax.default_backend() == "tpu":
        pytest.skip("a TPU has no float64")
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_heap():
    """Spare what there is, where garbage is collected: the heap of a suite takes seconds."""
    gc.freeze()
