"""Errors of the command line itself."""

from lora_jax import LoraError


class PromptError(LoraError):
    """There is no prompt, or none that the model can take."""


class ConversionError(LoraError):
    """An adapter cannot become what it was asked to become."""


class OutputError(LoraError):
    """A result cannot go where it was told to."""
