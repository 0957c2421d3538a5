"""The numbers that `record_from_data.py` recorded, and the model it used."""

import pathlib

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

RECORDED = load_file(pathlib.Path(__file__).parent / "recorded" / "from_data.safetensors")


def recorded_model(params, x):
    return jax.nn.gelu(x @ params["up"] + params["bias"], approximate=False) @ params["down"]


def recorded_params():
    names = {"up": "up.w", "bias": "up.bias", "down": "down.w"}
    params = {name: jnp.asarray(RECORDED[key]) for name, key in names.items()}
    return params | {"bias": params["bias"][None]}
