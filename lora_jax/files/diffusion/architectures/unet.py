"""The U-Net of Stable Diffusion: diffusers' UNet2DConditionModel."""

import dataclasses
from collections.abc import Iterator

from lora_jax.files.diffusion.architectures.modules import Module, conv, linear, norm, within

LAYERS = 2  # residual blocks in each block of the way down; the way up has one more


@dataclasses.dataclass(frozen=True)
class UNet:
    """What the U-Nets of SD 1.5, SD 2.1 and SDXL differ in.

    Attributes:
      depths: of the transformers in each block on the way down, 0 for a block without; the way up
        has them in reverse, and the middle as the last block, or one layer where that has none.
      context: the width of the text's embeddings.
      linear_projection: whether the transformers' projections are linear layers, not 1x1
        convolutions.
      added: the width of SDXL's further conditions; 0 for none.
      widths: of the blocks.
    """

    depths: tuple[int, ...]
    context: int
    linear_projection: bool
    added: int
    widths: tuple[int, ...]

    @property
    def time(self) -> int:
        """The width of the embedded time."""
        return 4 * self.widths[0]

    def modules(self) -> Iterator[Module]:
        """Yield all modules with a weight."""
        first, last = self.widths[0], self.widths[-1]
        yield conv("conv_in", first, 4)
        yield from _embedding("time_embedding", self.time, first)
        if self.added:
            yield from _embedding("add_embedding", self.time, self.added)
        yield from self._down()
        yield from within("mid_block.resnets.0", self._resnet(last, last))
        depth = self.depths[-1] or 1
        yield from within("mid_block.attentions.0", self._transformer(last, depth))
        yield from within("mid_block.resnets.1", self._resnet(last, last))
        yield from self._up()
        yield norm("conv_norm_out", first)
        yield conv("conv_out", 4, first)

    def _down(self) -> Iterator[Module]:
        ins = self.widths[0]
        for i, (width, depth) in enumerate(zip(self.widths, self.depths, strict=True)):
            block = f"down_blocks.{i}"
            for layer in range(LAYERS):
                yield from within(f"{block}.resnets.{layer}", self._resnet(ins, width))
                if depth:
                    at = f"{block}.attentions.{layer}"
                    yield from within(at, self._transformer(width, depth))
                ins = width
            if i < len(self.widths) - 1:
                yield conv(f"{block}.downsamplers.0.conv", width, width)

    def _up(self) -> Iterator[Module]:
        widths, depths = self.widths[::-1], self.depths[::-1]
        ins = widths[0]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            block, below = f"up_blocks.{i}", widths[min(i + 1, len(widths) - 1)]
            for layer in range(LAYERS + 1):
                skipped = below if layer == LAYERS else width
                at = f"{block}.resnets.{layer}"
                yield from within(at, self._resnet(ins + skipped, width))
                if depth:
                    at = f"{block}.attentions.{layer}"
                    yield from within(at, self._transformer(width, depth))
                ins = width
            if i < len(widths) - 1:
                yield conv(f"{block}.upsamplers.0.conv", width, width)

    def _resnet(self, ins: int, out: int) -> Iterator[Module]:
        yield norm("norm1", ins)
        yield conv("conv1", out, ins)
        yield linear("time_emb_proj", out, self.time)
        yield norm("norm2", out)
        yield conv("conv2", out, out)
        if ins != out:
            yield conv("conv_shortcut", out, ins, 1)

    def _transformer(self, width: int, depth: int) -> Iterator[Module]:
        yield norm("norm", width)
        yield self._projection("proj_in", width)
        for i in range(depth):
            yield from within(f"transformer_blocks.{i}", self._block(width))
        yield self._projection("proj_out", width)

    def _projection(self, name: str, width: int) -> Module:
        return linear(name, width, width) if self.linear_projection else conv(name, width, width, 1)

    def _block(self, width: int) -> Iterator[Module]:
        for i, ins in enumerate((width, self.context), 1):
            yield norm(f"norm{i}", width)
            yield linear(f"attn{i}.to_q", width, width, bias=False)
            yield linear(f"attn{i}.to_k", width, ins, bias=False)
            yield linear(f"attn{i}.to_v", width, ins, bias=False)
            yield linear(f"attn{i}.to_out.0", width, width)
        yield norm("norm3", width)
        yield linear("ff.net.0.proj", 8 * width, width)  # GEGLU: values and gates
        yield linear("ff.net.2", width, 4 * width)


def _embedding(name: str, width: int, ins: int) -> Iterator[Module]:
    yield linear(f"{name}.linear_1", width, ins)
    yield linear(f"{name}.linear_2", width, width)
