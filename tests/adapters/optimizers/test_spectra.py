"""Eigenvalues of many small matrices."""

import re

import jax
import numpy as np
import pytest

from lora_jax.adapters.optimizers.spectra import eigenvalues, gram


@pytest.mark.cpu("how jaxlib calls LAPACK")
def test_a_batch_is_no_single_call_to_lapack():
    """A call of a batch waits for threads that other such calls wait in: two cores hung."""
    x = jax.random.normal(jax.random.key(0), (3, 2, 6, 4))
    compiled = jax.jit(jax.vmap(lambda x: eigenvalues(gram(x)))).lower(x).compile()
    calls = re.findall(r"= \((.*?)\) custom-call\(.*lapack_ssyevd", compiled.as_text())
    assert calls and all(re.match(r"f32\[(1,)*4,4\]", call) for call in calls), calls
    squares, vectors = compiled(x)
    singular = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    np.testing.assert_allclose(squares[..., ::-1], singular**2, rtol=1e-4, atol=1e-5)
    rebuilt = (vectors * squares[..., None, :]) @ vectors.swapaxes(-1, -2)
    np.testing.assert_allclose(rebuilt, gram(x), rtol=1e-4, atol=1e-4)
