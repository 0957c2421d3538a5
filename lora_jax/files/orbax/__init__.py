"""Checkpoints of other JAX trainers, read and written: openpi, gemma, tunix (qwix) and MaxText."""

from lora_jax.files.orbax.checkpoint import load, save
from lora_jax.files.orbax.formats import FORMATS
from lora_jax.files.orbax.from_tree import from_tree
from lora_jax.files.orbax.to_tree import for_torch, naming, to_peft, to_tree

__all__ = ["FORMATS", "for_torch", "from_tree", "load", "naming", "save", "to_peft", "to_tree"]
