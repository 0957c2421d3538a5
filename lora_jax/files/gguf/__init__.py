"""LoRA adapters in GGUF, which llama.cpp applies while a model runs: read and written."""

from lora_jax.files.gguf.adapter_file import GgufAdapter, is_adapter, read_file
from lora_jax.files.gguf.load import fit, load
from lora_jax.files.gguf.names import Names
from lora_jax.files.gguf.save import save

__all__ = ["GgufAdapter", "Names", "fit", "is_adapter", "load", "read_file", "save"]
