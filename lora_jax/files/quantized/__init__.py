"""Published quantized models of Hugging Face: a file per format, and the table of them."""

from lora_jax.files.quantized.formats import FORMATS, read
from lora_jax.files.quantized.stored import INSTEAD, StoredCodes

__all__ = ["FORMATS", "INSTEAD", "StoredCodes", "read"]
