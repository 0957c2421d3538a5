"""What llama.cpp calls a model and its tensors."""

import dataclasses

from lora_jax.files.naming import Naming


@dataclasses.dataclass(frozen=True)
class Names:
    """A model in llama.cpp's words; `models.gguf_names(model)` returns them.

    Attributes:
      architecture: llama.cpp's name of the architecture, such as "llama" or "qwen2". llama.cpp
        refuses an adapter whose architecture is not the model's.
      naming: which tensor of the GGUF model is which leaf: `Entry("blk.{n}.attn_q.weight", ...)`.
        llama.cpp orders the rows of q and k of the architecture "llama" in its own way, which a
        row's `axes` must say.
      tied: whether the embedding is the output head too: llama.cpp stops at an adapter of it.
    """

    architecture: str
    naming: Naming
    tied: bool = False
