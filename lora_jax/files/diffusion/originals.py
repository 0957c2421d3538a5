"""Names of modules in the original code of Stable Diffusion and Flux, as rows of data.

Kohya's trainer has its U-Net of SDXL from Stability AI, and its Flux from Black Forest Labs, so its
files have their names: "input_blocks.4.1" for "down_blocks.1.attentions.0", and one "qkv" for three
projections.
"""

import re
from typing import NamedTuple

from lora_jax.files.diffusion.architectures.unet import LAYERS


class Original(NamedTuple):
    """A module of the original code, and the modules of diffusers that it joins along its outputs.

    `halves` says that the two halves of its outputs are in the other order there.
    """

    name: str
    parts: tuple[str, ...]
    halves: bool = False


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

#: The modules of Flux; `{n}` is the number of a block.
_FLUX = (
    Original("img_in", ("x_embedder",)),
    Original("txt_in", ("context_embedder",)),
    *(
        Original(f"{name}_in.{side}_layer", (f"time_text_embed.{other}_embedder.linear_{i}",))
        for name, other in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for i, side in enumerate(("in", "out"), 1)
    ),
    Original("final_layer.linear", ("proj_out",)),
    Original("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves=True),
    *(
        Original(f"double_blocks.{{n}}.{name}", tuple(f"transformer_blocks.{{n}}.{x}" for x in to))
        for name, to in {
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "img_attn.proj": ("attn.to_out.0",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "txt_attn.proj": ("attn.to_add_out",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "txt_mod.lin": ("norm1_context.linear",),
        }.items()
    ),
    *(
        Original(
            f"single_blocks.{{n}}.{name}", tuple(f"single_transformer_blocks.{{n}}.{x}" for x in to)
        )
        for name, to in {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        }.items()
    ),
)
_FLUX_PARTS = {part: row for row in _FLUX for part in row.parts}


def originals(component: str, name: str) -> list[Original]:
    """Return what a module of diffusers is in the original code, the usual name first.

    >>> originals("unet", "down_blocks.1.attentions.0.proj_in")[0].name
    'input_blocks.4.1.proj_in'
    >>> originals("transformer", "single_transformer_blocks.3.proj_mlp")[0].parts[2:]
    ('single_transformer_blocks.3.attn.to_v', 'single_transformer_blocks.3.proj_mlp')
    """
    if component == "unet":
        return [Original(x, (name,)) for x in _unet_names(name)]
    if component != "transformer":
        return []
    number = re.search(r"(?<=transformer_blocks\.)\d+", name)
    template = re.sub(r"(?<=transformer_blocks\.)\d+", "{n}", name)
    row = _FLUX_PARTS.get(template)
    if row is None:
        return []
    fill = lambda text: text.replace("{n}", number[0]) if number else text
    return [Original(fill(row.name), tuple(map(fill, row.parts)), row.halves)]


def _unet_names(name: str) -> list[str]:
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
