"""A file of kohya's of Flux, and what diffusers 0.42.1 converts it to."""

import torch
from diffusers.loaders import lora_conversion_utils


def flux() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a file of kohya's with all kinds of modules, and diffusers' conversion.

    Only the numbers of outputs are Flux's own where the converter insists on them.
    """
    generator = torch.Generator().manual_seed(5)
    sizes = {
        "double_blocks_0_img_attn_qkv": (12, 3, 3),
        "double_blocks_0_txt_attn_qkv": (12, 3, 3),
        "double_blocks_0_img_attn_proj": (4, 4, 2),
        "double_blocks_1_img_mlp_0": (8, 4, 2),
        "double_blocks_1_img_mlp_2": (4, 8, 2),
        "double_blocks_1_txt_mlp_0": (8, 4, 2),
        "double_blocks_1_txt_mod_lin": (24, 4, 2),
        "single_blocks_0_linear1": (21504, 2, 1),
        "single_blocks_0_linear2": (4, 9, 2),
        "single_blocks_0_modulation_lin": (12, 4, 2),
        "final_layer_adaLN_modulation_1": (8, 4, 2),
        "final_layer_linear": (3, 4, 2),
        "img_in": (4, 3, 2),
        "txt_in": (4, 5, 2),
        "time_in_in_layer": (4, 3, 2),
        "vector_in_out_layer": (4, 4, 2),
        "guidance_in_out_layer": (4, 4, 2),
    }
    tensors = {}
    for i, (name, (out, ins, rank)) in enumerate(sizes.items()):
        key, few = f"lora_unet_{name}", min(out, 96)
        up = torch.randn(few, rank, generator=generator).round(decimals=2)
        up = up.repeat(out // few, 1)
        if "txt_attn" in name:  # three of rank 1, as `split_qkv` has them
            up = up * torch.block_diag(*[torch.ones(4, 1)] * 3)
        tensors[f"{key}.lora_down.weight"] = torch.randn(rank, ins, generator=generator)
        tensors[f"{key}.lora_up.weight"] = up
        if "final" not in name:  # which the converter does not scale
            tensors[f"{key}.alpha"] = torch.tensor(1.0 + i % 3)
    converted = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    changes = {}
    for name, a in converted.items():
        if "lora_A" in name:
            module = "transformer." + name.split(".lora_A")[0].removeprefix("transformer.")
            changes[f"{module}.weight"] = converted[name.replace("lora_A", "lora_B")] @ a
    return tensors, changes
