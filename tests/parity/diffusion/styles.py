"""Files with the names of other programs, and trees of the weights that they change."""

import pathlib

import numpy as np

from lora_jax.files.disk import safetensors_file
from lora_jax.files.naming import Entry, Naming

RECORDED = np.load(pathlib.Path(__file__).parent / "names.npz")
STYLES = [name.removesuffix("/file") for name in RECORDED.files if name.endswith("/file")]
_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
NAMING = Naming(
    (
        Entry("{*m}.bias", "{*m}/bias"),
        *(Entry(f"{{*m}}.{x}.weight", f"{{*m}}/{x}/scale") for x in _NORMS),
        Entry("{*m}.weight", "{*m}/kernel", "linear"),
    )
)


def changes(style: str) -> dict[str, np.ndarray]:
    """Return the recorded changes under PyTorch's names."""
    return safetensors_file.decode(RECORDED[f"{style}/changes"].tobytes(), style)[0]


def zeros(style: str) -> dict[str, np.ndarray]:
    """Return a flat tree of zeros for every weight that changes."""
    return {_path(name): np.zeros(x.shape[::-1], "float32") for name, x in changes(style).items()}


def _path(name: str) -> str:
    *module, leaf = name.split(".")
    if leaf == "weight":
        leaf = "scale" if module[-1] in _NORMS else "kernel"
    return "/".join([*module, leaf])
