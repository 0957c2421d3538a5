"""The text encoders of Stable Diffusion: transformers' CLIPTextModel."""

import dataclasses
from collections.abc import Iterator

from lora_jax.files.diffusion.architectures.modules import (
    EMBEDDING,
    Module,
    linear,
    norm,
    within,
)


@dataclasses.dataclass(frozen=True)
class ClipText:
    """The sizes of a text encoder; those of CLIP ViT-L/14 by default."""

    width: int = 768
    layers: int = 12
    projected: int = 0  # the width of `text_projection`; 0 for none

    def modules(self) -> Iterator[Module]:
        """Yield all modules with a weight."""
        yield from within("text_model", self._model())
        if self.projected:
            yield linear("text_projection", self.projected, self.width, bias=False)

    def _model(self) -> Iterator[Module]:
        width = self.width
        for name, rows in (("token_embedding", 49408), ("position_embedding", 77)):
            yield Module(f"embeddings.{name}", EMBEDDING, (rows, width), bias=False)
        for i in range(self.layers):
            yield from within(f"encoder.layers.{i}", self._layer())
        yield norm("final_layer_norm", width)

    def _layer(self) -> Iterator[Module]:
        width = self.width
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield linear(f"self_attn.{name}", width, width)
        yield norm("layer_norm1", width)
        yield linear("mlp.fc1", 4 * width, width)
        yield linear("mlp.fc2", width, 4 * width)
        yield norm("layer_norm2", width)
