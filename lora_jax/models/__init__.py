"""Reference models in ordinary Flax that read published weights.

>>> from lora_jax import models
>>> pretrained = models.load("SmolLM2-135M-Instruct")  # doctest: +SKIP
>>> logits = pretrained.apply(pretrained.params, ids)  # doctest: +SKIP
"""

from lora_jax.models.adapter_vocabulary import resize_for_adapter
from lora_jax.models.decoder.gguf_names import gguf_names
from lora_jax.models.decoder.router_load import hidden_with_router_loss
from lora_jax.models.families import naming
from lora_jax.models.generation import generate, left_pad, stream
from lora_jax.models.pretrained import Apply, Pretrained, load, naming_of
from lora_jax.models.saving import files, save
from lora_jax.models.speech.features import log_mel
from lora_jax.models.speech.long_recordings import transcribe_long
from lora_jax.models.speech.tokens import SpeechTokens
from lora_jax.models.speech.transcription import transcribe
from lora_jax.models.vision.images import ImageProcessor
from lora_jax.models.vocabulary import resize_vocabulary, untie_head
from lora_jax.models.weights.published import read_tensors
from lora_jax.models.weights.sharding_rules import RULES

__all__ = [
    "RULES",
    "Apply",
    "ImageProcessor",
    "Pretrained",
    "SpeechTokens",
    "files",
    "generate",
    "gguf_names",
    "hidden_with_router_loss",
    "left_pad",
    "load",
    "log_mel",
    "naming",
    "naming_of",
    "read_tensors",
    "resize_for_adapter",
    "resize_vocabulary",
    "save",
    "stream",
    "transcribe",
    "transcribe_long",
    "untie_head",
]
