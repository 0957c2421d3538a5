"""Many small programs, of which compiling is nearly all the time."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled():
    """XLA without most optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
