"""The errors and the warning that lora_jax raises; every message names a parameter path."""


class LoraError(ValueError):
    """Base of every error that lora_jax raises on bad input."""


class ConfigError(LoraError):
    """A `LoraConfig` field has a value that cannot be used."""


class TargetError(LoraError):
    """A pattern matches nothing, or a targeted leaf cannot be adapted."""


class LayoutError(LoraError):
    """Which axes of a weight are batch, in and out cannot be decided."""


class StructureError(LoraError):
    """Two parameter trees, or a weight and its factors, do not fit together."""


class MergeError(LoraError):
    """A merge would write values that are not finite into the base."""


class AdapterFileError(LoraError):
    """An adapter file is truncated, foreign, or does not fit the base."""


class ModelFileError(LoraError):
    """A published model's or tokenizer's file is truncated, foreign or of an unknown kind."""


class ChatTemplateError(LoraError):
    """A chat template is broken, is refused by its sandbox, or refuses the conversation."""


class AssetError(RuntimeError):
    """A published file cannot be fetched; the message is one line that says what to do."""


class DenseError(LoraError):
    """`on_dense="error"` and a weight would have been made dense."""


class DenseWarning(UserWarning):
    """A weight was made dense: the result is right, but it costs a weight's memory."""
