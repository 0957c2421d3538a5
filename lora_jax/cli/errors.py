"""Errors of the command line itself."""

from lora_jax import LoraError


class PromptError(LoraError):
    """There is no prompt, or not one that the model can continue."""


class ConversionError(LoraError):
    """An adapter cannot be converted as requested."""


class OutputError(LoraError):
    """A result cannot be written where it was requested."""
