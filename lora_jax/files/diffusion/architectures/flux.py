"""The transformer of Flux.1: diffusers' FluxTransformer2DModel."""

import dataclasses
from collections.abc import Iterator

from lora_jax.files.diffusion.architectures.modules import Module, linear, norm, within


@dataclasses.dataclass(frozen=True)
class Flux:
    """The sizes of a Flux transformer; those of Flux.1 dev by default."""

    width: int = 3072
    double: int = 19  # blocks in which image and text have different weights
    single: int = 38
    head: int = 128
    context: int = 4096
    pooled: int = 768
    channels: int = 64

    def modules(self) -> Iterator[Module]:
        """Yield all modules with a weight."""
        width = self.width
        sizes = {"timestep_embedder": 256, "guidance_embedder": 256, "text_embedder": self.pooled}
        for name, ins in sizes.items():
            yield linear(f"time_text_embed.{name}.linear_1", width, ins)
            yield linear(f"time_text_embed.{name}.linear_2", width, width)
        yield linear("context_embedder", width, self.context)
        yield linear("x_embedder", width, self.channels)
        for i in range(self.double):
            yield from within(f"transformer_blocks.{i}", self._double())
        for i in range(self.single):
            yield from within(f"single_transformer_blocks.{i}", self._single())
        yield linear("norm_out.linear", 2 * width, width)
        yield linear("proj_out", self.channels, width)

    def _double(self) -> Iterator[Module]:
        width = self.width
        for name in ("norm1.linear", "norm1_context.linear"):
            yield linear(name, 6 * width, width)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield norm(f"attn.{name}", self.head, bias=False)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            yield linear(f"attn.{name}", width, width)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield linear(f"attn.{name}", width, width)
        for name in ("ff", "ff_context"):
            yield linear(f"{name}.net.0.proj", 4 * width, width)
            yield linear(f"{name}.net.2", width, 4 * width)

    def _single(self) -> Iterator[Module]:
        width = self.width
        yield linear("norm.linear", 3 * width, width)
        yield linear("proj_mlp", 4 * width, width)
        yield linear("proj_out", width, 5 * width)
        for name in ("norm_q", "norm_k"):
            yield norm(f"attn.{name}", self.head, bias=False)
        for name in ("to_q", "to_k", "to_v"):
            yield linear(f"attn.{name}", width, width)
