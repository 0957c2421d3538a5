"""The errors and the warning of lora_jax; messages name the parameter path and what to do."""

from lora_jax.core.foreign import escaped


class LoraError(ValueError):
    """Base class of the errors that lora_jax raises on bad input; it is a `ValueError`.

    The message may quote a file: control characters are escaped, and a very long one is shortened.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(escaped(str(message)))


class ConfigError(LoraError):
    """A field of `LoraConfig`, or another argument, has a value without meaning."""


class TargetError(LoraError):
    """A pattern matches no parameter, or a targeted leaf cannot be adapted."""


class LayoutError(LoraError):
    """It is unknown or contradictory which axes of a weight are batch, in and out."""


class StructureError(LoraError):
    """Parameter trees, or a weight and its factors, do not fit together."""


class MergeError(LoraError):
    """A merge would write NaN or infinity into the base, or an unmerge cannot recover it."""


class AdapterFileError(LoraError):
    """An adapter file is damaged, has an unknown format, or does not fit the base."""


class ModelFileError(LoraError):
    """A file of a published model or tokenizer is damaged or has an unknown format."""


class ChatTemplateError(LoraError):
    """A chat template is malformed, violates its sandbox, or rejects the conversation."""


class AssetError(RuntimeError):
    """A published file cannot be downloaded; the message says what to do in one line."""


class DenseError(LoraError):
    """A weight would be materialized, and `on_dense="error"` forbids it."""


class DenseWarning(UserWarning):
    """A weight was materialized: the result is correct, but costs the memory of a weight."""
