"""The endings of tensors' names in LoRA files of image generators, and what they mean."""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

#: What a tensor is in its module, by the end of its name, the longest first.
_ENDINGS = {
    "_lora.alpha": "alpha",  # older ones of diffusers, as below
    # kohya
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    # PEFT and diffusers
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    # older ones of diffusers
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    # LyCORIS
    **{f".hada_{x}": f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{x}": f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
}
#: Endings of methods that are not read, and their names.
_UNREAD = {
    ".on_input": "IA³",
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".bm.weight": "GLoRA",
}
_PREFIX = "base_model.model."  # of PEFT
#: The beginnings of names that no other kind of file has.
_UNDERSCORED = re.compile(r"(lora_(unet|te\d?|transformer)|lycoris)_")
_DOTTED = re.compile(r"(unet|transformer|text_encoder(_\d)?|diffusion_model)\.")


class Part(NamedTuple):
    """What one tensor of a file is."""

    module: str  # the module as the file calls it
    field: str


def part_of_name(name: str) -> Part | None:
    """Parse a tensor's name; None if it has no known ending.

    >>> part_of_name("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
    Part(module='lora_unet_mid_block_attentions_0_proj_in', field='down')
    >>> part_of_name("unet.mid_block.attn1.processor.to_q_lora.up.weight").module
    'unet.mid_block.attn1.processor.to_q'
    """
    for ending, field in _ENDINGS.items():
        if name.endswith(ending) and len(name) > len(ending):
            return Part(name.removesuffix(ending).removeprefix(_PREFIX), field)
    return None


def unread(name: str, names: Mapping[str, object]) -> str:
    """Return the end of a message about a tensor with an unknown ending."""
    module = name.removesuffix(".weight")
    ending = ".on_input" if f"{module}.on_input" in names else f".{name.rpartition('.')[2]}"
    if name.endswith(".weight") and ending != ".on_input":
        ending = f".{'.'.join(name.split('.')[-2:])}"
    method = _UNREAD.get(ending)
    if method is None:
        return "unexpected"
    return f"is of {method}, which is not read here; merge it with LyCORIS, and use lora.extract"


def layout_of(names: Mapping[str, object]) -> str | None:
    """Return "kohya" or "diffusers" if a file has names of that kind, else None.

    >>> layout_of({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": 0})
    'kohya'
    """
    parts = [name for name in names if part_of_name(name)]
    if any(_UNDERSCORED.match(name) for name in parts):
        return "kohya"
    return "diffusers" if any(_DOTTED.match(name) for name in parts) else None


@dataclasses.dataclass
class ModuleTensors:
    """The tensors of one module in a file, and their names there, by field."""

    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    names: dict[str, str] = dataclasses.field(default_factory=dict)


def group(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, ModuleTensors], dict[str, str]]:
    """Return the tensors by module, and the names that cannot be used, with why."""
    modules: dict[str, ModuleTensors] = {}
    problems: dict[str, str] = {}
    for name, tensor in tensors.items():
        part = part_of_name(name)
        if part is None:
            problems[name] = unread(name, tensors)
            continue
        module = modules.setdefault(part.module, ModuleTensors())
        if part.field in module.tensors:
            problems[name] = f"has the meaning of {module.names[part.field]}"
            continue
        module.tensors[part.field], module.names[part.field] = tensor, name
    return modules, problems
