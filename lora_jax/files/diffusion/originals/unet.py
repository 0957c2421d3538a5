"""What the U-Net of Stability AI's code calls the modules of diffusers' U-Net."""

import re

from lora_jax.files.diffusion.architectures.unet import LAYERS

_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv_norm_out": "out.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
_SAMPLER = re.compile(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv")
_MID = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


def unet_names(name: str) -> list[str]:
    """Return what a module of diffusers may be called, the usual name first.

    >>> unet_names("down_blocks.1.attentions.0.proj_in")
    ['input_blocks.4.1.proj_in']
    """
    if name in _UNET:
        return [_UNET[name]]
    if found := _MID.fullmatch(name):
        where, rest = found.groups()
        return [f"middle_block.{_MIDDLE[where]}.{_inner(where, rest)}"] if where in _MIDDLE else []
    if found := _SAMPLER.fullmatch(name):
        block = int(found[2])
        if found[1] == "down":
            return [f"input_blocks.{(LAYERS + 1) * (block + 1)}.0.op"]
        at = f"output_blocks.{(LAYERS + 1) * block + LAYERS}"
        return [f"{at}.2.conv", f"{at}.1.conv"]  # after the attention, in a block with one
    if found := _BLOCK.fullmatch(name):
        way, number, what, layer, rest = found.groups()
        before = (LAYERS + 1) * int(number) + int(layer)
        at = f"input_blocks.{before + 1}" if way == "down" else f"output_blocks.{before}"
        return [f"{at}.{int(what == 'attentions')}.{_inner(what, rest)}"]
    return []


def _inner(what: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if what.startswith("resnets") else rest
