"""Initial values against recorded ones of peft 0.21.2: same numbers, same distributions."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy import stats

import lora_jax
from lora_jax import LoraConfig

RECORD = load_file(pathlib.Path(__file__).parent / "recorded" / "starts.safetensors")
KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("scaling", ["standard", "rslora"])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_same_numbers(name, scaling):
    """PyTorch keeps W as [out, in]: the layout "oi", or "io" transposed."""
    prefix = name if scaling == "standard" else f"{name} with rslora"
    a, b, base, scale = (RECORD[f"{prefix}/{part}"] for part in ("a", "b", "base", "scale"))
    product = b @ a
    params = {"oi": jnp.asarray(RECORD["w"]), "io": jnp.asarray(RECORD["w"].T)}
    config = LoraConfig(
        rank=4, alpha=6, init=name, scaling=scaling, overrides={"oi": {"layout": "oi"}}
    )
    for path, node in lora_jax.init(KEY, params, config).items():
        turned = np.transpose if path == "io" else np.asarray
        np.testing.assert_allclose(node.scale, scale, rtol=1e-6)
        np.testing.assert_allclose(node.a @ node.b, product.T, atol=1e-5)
        np.testing.assert_allclose(node.w, turned(base), atol=1e-5)
        # Each factor up to the signs, which a decomposition is free to choose.
        np.testing.assert_allclose(np.abs(node.a), np.abs(a.T), atol=1e-5)
        np.testing.assert_allclose(np.abs(node.b), np.abs(b.T), atol=1e-5)


LAYERS = {
    "linear": (nn.Dense(300), jnp.zeros((1, 400))),
    "conv": (nn.Conv(64, (3, 3)), jnp.zeros((1, 4, 4, 16))),
    "embedding": (nn.Embed(400, 300), jnp.zeros((1,), jnp.int32)),
}


@pytest.mark.parametrize(
    "case", sorted({key.rpartition("/")[0] for key in RECORD if key.count("/") == 2})
)
def test_the_same_distribution(case):
    """Equal if constant; otherwise a Kolmogorov–Smirnov test cannot tell the two apart."""
    name, kind = case.split("/")
    module, x = LAYERS[kind]
    shapes = jax.eval_shape(module.init, KEY, x)["params"]
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    path = "embedding" if kind == "embedding" else "kernel"
    config = LoraConfig(rank=16, init=name, targets=[path])
    fn = lambda params, x: module.apply({"params": params}, x)
    node = lora_jax.init(KEY, params, config, fn, x)[path]
    for part in ("a", "b"):
        ours, theirs = np.asarray(getattr(node, part)).ravel(), RECORD[f"{case}/{part}"]
        if len(theirs) == 1:
            np.testing.assert_array_equal(ours, theirs[0])
        else:
            assert stats.ks_2samp(ours, theirs).pvalue > 0.01
