"""The modules of published models, and the names that the original U-Net gave them, as JSON."""

import json

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def modules() -> dict[str, str]:
    """Return the modules of the published models as lines of JSON."""
    with torch.device("meta"):
        models = {
            "sd15 unet": UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
            "sd21 unet": UNet2DConditionModel(
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            ),
            "sd21 text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=23,
                    num_attention_heads=16,
                )
            ),
            "sdxl unet": UNet2DConditionModel(
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "flux transformer": FluxTransformer2DModel(guidance_embeds=True),
            "sdxl text_encoder": CLIPTextModel(
                CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072)
            ),
            "sdxl text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=20,
                    projection_dim=1280,
                )
            ),
        }
    return {name: json.dumps(listed(model)) for name, model in models.items()}


def listed(model: torch.nn.Module) -> list:
    kinds = {"Linear": "linear", "Conv2d": "conv", "Embedding": "embedding"}
    start = "text_model." if type(model) is CLIPTextModel else ""  # files have it, this class not
    return sorted(
        [
            start + name,
            kinds.get(type(x).__name__, "norm"),
            list(x.weight.shape),
            x.bias is not None,
        ]
        if hasattr(x, "bias")
        else [start + name, kinds.get(type(x).__name__, "norm"), list(x.weight.shape), False]
        for name, x in model.named_modules()
        if getattr(x, "weight", None) is not None
    )


def original_modules(multiples: tuple[int, ...], attention: tuple[int, ...]) -> list[str]:
    """List modules as the original code makes them: `channel_mult`, `attention_resolutions`."""
    resnet = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    transformer = ("norm", "proj_in", "transformer_blocks.0.attn2.to_v", "proj_out")
    names = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    inside = lambda at, leaves: [f"{at}.{leaf}" for leaf in leaves]
    number, scale = 1, 1
    for level in range(len(multiples)):
        for layer in range(2):
            shortcut = ["skip_connection"] * (
                level > 0 and not layer and multiples[level] != multiples[level - 1]
            )
            names += inside(f"input_blocks.{number}.0", (*resnet, *shortcut))
            if scale in attention:
                names += inside(f"input_blocks.{number}.1", transformer)
            number += 1
        if level < len(multiples) - 1:
            names.append(f"input_blocks.{number}.0.op")
            number, scale = number + 1, scale * 2
    names += inside("middle_block.0", resnet) + inside("middle_block.2", resnet)
    names += inside("middle_block.1", transformer)
    number = 0
    for level in reversed(range(len(multiples))):
        for layer in range(3):
            names += inside(f"output_blocks.{number}.0", (*resnet, "skip_connection"))
            if scale in attention:
                names += inside(f"output_blocks.{number}.1", transformer)
            if level and layer == 2:
                names.append(f"output_blocks.{number}.{1 + (scale in attention)}.conv")
                scale //= 2
            number += 1
    return names


def converted_originals(names: list[str], config: dict) -> str:
    """Return pairs of the original's and diffusers' names of modules, as JSON."""
    marked = {
        f"model.diffusion_model.{n}.{x}": torch.tensor(float(i))
        for i, n in enumerate(names)
        for x in ("weight", "bias")
    }
    config = {"layers_per_block": 2, "class_embed_type": None, "num_class_embeds": None} | config
    found = single_file_utils.convert_ldm_unet_checkpoint(marked, config)
    back = {int(x): name.rpartition(".")[0] for name, x in found.items()}
    return json.dumps([[name, back[i]] for i, name in enumerate(names)])


def originals() -> dict[str, str]:
    added = ["label_emb.0.0", "label_emb.0.2"]
    return {
        "sd15": converted_originals(
            original_modules((1, 2, 4, 4), (4, 2, 1)), {"addition_embed_type": None}
        ),
        "sdxl": converted_originals(
            original_modules((1, 2, 4), (4, 2)) + added, {"addition_embed_type": "text_time"}
        ),
    }
