"""The tiny models of the recorded files as JAX trees."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np

from lora_jax import diffusion
from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Naming, to_tree

RECORDED = np.load(pathlib.Path(__file__).parent / "diffusion.npz")
NAMING, FLUX = diffusion.naming("sd15"), diffusion.naming("flux")
FILES = [name.removesuffix("/file") for name in RECORDED.files if name.endswith("/file")]
CASES = [name for name in FILES if name != "flux"]


def tensors(name: str) -> dict[str, np.ndarray]:
    """Return what is recorded as a safetensors file."""
    return safetensors_file.decode(RECORDED[name].tobytes(), name)[0]


def path_of(name: str) -> str:
    """Return the path of a tensor in the tree.

    >>> path_of("unet.down_blocks.0.resnets.0.norm1.weight")
    'unet/down_blocks/0/resnets/0/norm1/scale'
    """
    *module, leaf = name.split(".")
    if leaf == "weight":
        leaf = "scale" if module[-1].startswith("norm") and module[-1] != "norm_out" else "kernel"
    return "/".join([*module, leaf])


def tree_of(naming: Naming, weights: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Return a flat tree of weights with PyTorch's names."""
    like = {}
    for name, x in weights.items():
        out_last = x.shape if x.ndim == 1 else (*x.shape[2:], x.shape[1], x.shape[0])
        like[path_of(name)] = jax.ShapeDtypeStruct(out_last, x.dtype)
    return to_tree(naming, weights, like)


@functools.cache
def base() -> Any:
    """Return the modules of the U-Net and the text encoder."""
    return tree_of(NAMING, tensors("base"))


@functools.cache
def flux_base() -> Any:
    """Return zeros for every weight that the recorded file of Flux changes."""
    changed = tensors("flux/merged")
    return tree_of(FLUX, {name: np.zeros_like(x) for name, x in changed.items()})


def write(case: str, folder: pathlib.Path) -> pathlib.Path:
    """Write a recorded file into a folder."""
    path = folder / "lora.safetensors"
    path.write_bytes(RECORDED[f"{case}/file"].tobytes())
    return path
