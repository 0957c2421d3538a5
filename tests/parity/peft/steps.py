"""The recorded steps of `record_step.py`, and their layers as plain functions."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

import lora_jax

FILE = pathlib.Path(__file__).parent / "recorded" / "step.safetensors"
SGD_RATE, ADAM_RATE = 0.1, 0.01

# kind -> layout of its weight
KINDS = {
    "linear": "io",
    "conv1d_gpt2": "io",
    "embedding": "io",
    "conv1d": "iio",
    "conv2d": "iiio",
}


@functools.cache
def recorded() -> dict[str, Any]:
    """Return the recorded arrays by `<kind>/<variant>/<name>`; see `record_step.py`."""
    return load_file(FILE)


def numbers(kind: str, variant: str) -> dict[str, jax.Array]:
    """Return the recorded arrays of one layer kind and variant by name."""
    start = f"{kind}/{variant}/"
    return {
        key.removeprefix(start): jnp.asarray(x)
        for key, x in recorded().items()
        if key.startswith(start)
    }


def layer(kind: str, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Compute the layer that PEFT adapted; `params` has w and, except for an embedding, bias."""
    w = params["w"]
    if kind == "embedding":
        return w[x]
    if kind in ("linear", "conv1d_gpt2"):
        y = x @ w
    elif kind == "conv1d":
        y = jax.lax.conv_general_dilated(
            x, w, (1,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
        )
    else:
        y = jax.lax.conv_general_dilated(
            x, w, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    return y + jnp.broadcast_to(params["bias"], y.shape)


def params_of(kind: str, recorded: dict[str, jax.Array]) -> dict[str, Any]:
    """Return the layer's parameters as a joined tree, with the recorded initial values."""
    weight = lora_jax.LoraWeight(
        recorded["w"],
        recorded["a"],
        recorded["b"],
        jnp.float32(recorded["scale"]),
        recorded.get("m"),
        layout=lora_jax.Layout(KINDS[kind]),
    )
    return {"w": weight} | ({"bias": recorded["bias"]} if "bias" in recorded else {})
