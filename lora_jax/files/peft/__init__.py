"""Adapter files of Hugging Face PEFT, read and written, for any tree that a `Naming` describes."""

from lora_jax.files.peft.config import PeftConfig
from lora_jax.files.peft.load import CONFIG, TENSORS, load, read_config
from lora_jax.files.peft.save import save

__all__ = ["CONFIG", "TENSORS", "PeftConfig", "load", "read_config", "save"]
