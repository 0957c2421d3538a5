"""Adapter files of mlx-lm, read and written, for any tree that a `Naming` describes."""

from lora_jax.files.mlx.adapter_file import CONFIG, TENSORS, MlxFile, is_config, read_file
from lora_jax.files.mlx.load import fit, load
from lora_jax.files.mlx.save import save

__all__ = ["CONFIG", "TENSORS", "MlxFile", "fit", "is_config", "load", "read_file", "save"]
