"""lora_jax's own adapter files: one adapter, or a stack of them in one file or in a directory."""

from lora_jax.files.native.file import (
    MODEL,
    NativeFile,
    is_header,
    member_of,
    read_file,
    read_metadata,
)
from lora_jax.files.native.fit import fit
from lora_jax.files.native.load import SUFFIX, load
from lora_jax.files.native.save import save

__all__ = [
    "MODEL",
    "SUFFIX",
    "NativeFile",
    "fit",
    "is_header",
    "load",
    "member_of",
    "read_file",
    "read_metadata",
    "save",
]
