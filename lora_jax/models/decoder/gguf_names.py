"""What llama.cpp calls a model: its architecture, and the names of its tensors."""

from lora_jax.core.errors import StructureError
from lora_jax.core.foreign import shown_value
from lora_jax.files.gguf import Names
from lora_jax.models.decoder import gguf
from lora_jax.models.decoder.gguf_architectures import ARCHITECTURE_OF
from lora_jax.models.families import is_tied
from lora_jax.models.pretrained import Pretrained

#: Architectures whose models are not read here, only their adapters: by `model_type`, the
#: architecture, and the `model_type` whose names and order of rows it shares.
_LIKE = {
    "smollm3": ("smollm3", "llama"),
    "granite": ("granite", "llama"),
    "olmo2": ("olmo2", "gemma2"),
}
#: `model_type` in config.json -> llama.cpp's architecture and the `model_type` of its names.
KNOWN = {**{name: (x, name) for name, x in ARCHITECTURE_OF.items()}, **_LIKE}


def gguf_names(model: Pretrained) -> Names:
    """Return what llama.cpp calls a model, for `lora_jax.gguf.load` and `save`.

    Args:
      model: from `models.load`, whatever kind of file it comes from.

    Raises:
      StructureError: the model has no names in llama.cpp here.

    >>> from lora_jax.models.tiny import tiny
    >>> gguf_names(tiny(16)).architecture
    'llama'
    """
    model_type = model.settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in KNOWN:
        raise StructureError(
            f"a model of the type {shown_value(model_type)} has no names in llama.cpp here, only "
            f"{', '.join(KNOWN)}; give lora_jax.gguf your own Names"
        )
    architecture, like = KNOWN[model_type]
    naming = gguf.file_naming(model.naming, {**model.settings, "model_type": like})
    return Names(architecture, naming, tied=is_tied(model.settings))
