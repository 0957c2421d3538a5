"""Errors of the command line itself."""

from lora_jax.core.errors import LoraError


class AdapterOptionError(LoraError):
    """An option of reading an adapter is wrong, or not for this kind of adapter."""


class PromptError(LoraError):
    """The prompt is missing, or the model cannot continue it."""


class ClassifierError(LoraError):
    """What was given is not a sequence classifier, or cannot be used as one."""


class ConversionError(LoraError):
    """An adapter cannot be converted as requested."""


class OutputError(LoraError):
    """A result cannot be written where it was requested."""
