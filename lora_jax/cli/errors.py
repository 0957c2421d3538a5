"""Errors of the command line itself."""

from lora_jax import LoraError


class PromptError(LoraError):
    """The prompt is missing, or the model cannot continue it."""


class ClassifierError(LoraError):
    """A model or an adapter is no sequence classifier, or its labels are not those of the data."""


class ConversionError(LoraError):
    """An adapter cannot be converted as requested."""


class OutputError(LoraError):
    """A result cannot be written where it was requested."""
