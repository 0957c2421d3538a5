"""The tiny U-Net and text encoder of the recorded files, and their layers, in PyTorch."""

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

BLOCK = "down_blocks.1.attentions.0"


LINEAR = (
    f"{BLOCK}.transformer_blocks.0.attn1.to_q",
    f"{BLOCK}.transformer_blocks.0.attn1.to_out.0",
    f"{BLOCK}.transformer_blocks.0.attn2.to_k",
    f"{BLOCK}.transformer_blocks.0.ff.net.0.proj",
)


CONV = ("down_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut", f"{BLOCK}.proj_in")


UP = (
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.0.attentions.2.proj_out",
    "mid_block.resnets.1.conv2",
)


NORMS = ("down_blocks.0.resnets.0.norm1",)


TEXT = tuple(
    f"encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
)


#: The names that kohya's trainer gives these modules in its U-Net of SDXL.
ORIGINAL = {
    f"{BLOCK}.": "input_blocks.4.1.",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "up_blocks.0.resnets.0.conv_shortcut": "output_blocks.0.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.0.attentions.2.": "output_blocks.2.1.",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
}


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        cross_attention_dim=6,
        attention_head_dim=2,
    )


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=9, num_hidden_layers=1, **sizes))


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        value.data = 0.5 * torch.randn(value.shape, generator=generator)
