"""LoRA files of image generators, Stable Diffusion and Flux: kohya's, LyCORIS', diffusers'."""

from lora_jax.files.diffusion.adapter_file import DiffusionFile, read_file
from lora_jax.files.diffusion.architectures import ARCHITECTURES, naming
from lora_jax.files.diffusion.architectures.find import find_component, weights
from lora_jax.files.diffusion.components import COMPONENTS
from lora_jax.files.diffusion.fields import layout_of
from lora_jax.files.diffusion.find import find_architecture
from lora_jax.files.diffusion.load import fit, load
from lora_jax.files.diffusion.save import save

__all__ = [
    "ARCHITECTURES",
    "COMPONENTS",
    "DiffusionFile",
    "find_architecture",
    "find_component",
    "fit",
    "layout_of",
    "load",
    "naming",
    "read_file",
    "save",
    "weights",
]
