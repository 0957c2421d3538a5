"""Text to token ids and back: tokenizers of published models, and their chat templates."""

from lora_jax.models.text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
