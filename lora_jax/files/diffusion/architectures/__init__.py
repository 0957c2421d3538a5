"""The modules of published image generators as data: SD 1.5, SD 2.1, SDXL and Flux."""

from lora_jax.files.diffusion.architectures.modules import Module
from lora_jax.files.diffusion.architectures.rows import naming
from lora_jax.files.diffusion.architectures.table import ARCHITECTURES, Architecture

__all__ = ["ARCHITECTURES", "Architecture", "Module", "naming"]
