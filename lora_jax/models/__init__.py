"""Reference models in ordinary Flax that read published weights.

>>> from lora_jax import models
>>> pretrained = models.load("SmolLM2-135M-Instruct")  # doctest: +SKIP
>>> logits = pretrained.apply(pretrained.params, ids)  # doctest: +SKIP
"""

from lora_jax.models.generation import generate, left_pad, stream
from lora_jax.models.namings import naming
from lora_jax.models.pretrained import Apply, Pretrained, files, load, naming_of, save

__all__ = [
    "Apply",
    "Pretrained",
    "files",
    "generate",
    "left_pad",
    "load",
    "naming",
    "naming_of",
    "save",
    "stream",
]
