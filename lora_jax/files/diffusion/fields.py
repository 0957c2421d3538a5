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
    **{f".{x}.weight": x for x in ("a1", "a2", "b1", "b2", "bm")},
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".on_input": "on_input",
    ".scale": "scale",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
}
#: Endings of methods that are not read, and their names.
_UNREAD = {".oft_diag": "an early OFT", ".lambda_layer": "T-LoRA"}
#: Endings of X-Labs, whose names keep "_lora1" (of the image) and "_lora2" (of the text).
_NUMBERED = {f"_lora{n}.{x}.weight": x for n in (1, 2) for x in ("down", "up")}
_PREFIX = "base_model.model."  # of PEFT
#: The beginnings of names that no other kind of file has.
_UNDERSCORED = re.compile(r"((lora|oft)_(unet|te\d?|transformer)|lycoris)_")
_DOTTED = re.compile(
    r"(unet|transformer|text_encoders?(_\d)?|diffusion_model|(double|single)_blocks)\."
)


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
    for ending, field in _NUMBERED.items():
        if name.endswith(ending):
            return Part(name.removesuffix(f".{field}.weight").removeprefix(_PREFIX), field)
    for ending, field in _ENDINGS.items():
        if name.endswith(ending) and len(name) > len(ending):
            return Part(name.removesuffix(ending).removeprefix(_PREFIX), field)
    return None


def _unread(name: str) -> str:
    """Return the end of a message about a tensor with an unknown ending."""
    method = _UNREAD.get(f".{name.rpartition('.')[2]}")
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
        module = name.removesuffix(".weight")
        if part is None and f"{module}.on_input" in tensors:
            part = Part(module.removeprefix(_PREFIX), "ia3")  # LyCORIS names it like a weight
        if part is None:
            problems[name] = _unread(name)
            continue
        own = modules.setdefault(part.module, ModuleTensors())
        if part.field in own.tensors:
            problems[name] = f"has the meaning of {own.names[part.field]}"
            continue
        own.tensors[part.field], own.names[part.field] = tensor, name
    return modules, problems
