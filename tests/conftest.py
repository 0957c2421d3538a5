"""The suite is stricter than users are: several devices, no implicit rank promotion."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("lora_jax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("lora_jax")


@pytest.fixture
def strict():
    """No implicit dtype promotion; optax.adam and a bfloat16 nn.LayerNorm do not stand it."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def quick_compile():
    """XLA without most optimizations: for many small programs compiling is most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def x64():
    """64-bit types within one test."""
    with jax.enable_x64(True):
        yield
