"""Adapter files of Hugging Face PEFT, read and written, for any tree that a `Naming` describes."""

from lora_jax.files.peft.adapter_file import TENSORS, PeftFile, read_config, read_file
from lora_jax.files.peft.config import CONFIG, PeftConfig, is_config
from lora_jax.files.peft.load import fit, load
from lora_jax.files.peft.model_card import CARD, ModelCard, may_replace_card
from lora_jax.files.peft.save import save

__all__ = [
    "CARD",
    "CONFIG",
    "TENSORS",
    "ModelCard",
    "PeftConfig",
    "PeftFile",
    "fit",
    "is_config",
    "load",
    "may_replace_card",
    "read_config",
    "read_file",
    "save",
]
