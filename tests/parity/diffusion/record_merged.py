"""The weights into which LyCORIS and diffusers merge a file: the oracle of check_diffusion.py.

    python -m tests.parity.diffusion.record_merged (diffusers|lycoris) FILE ...

writes them to FILE.npz.
"""

import json
import sys

import numpy as np
import torch
from diffusers.loaders import lora_conversion_utils
from lycoris.modules import get_module, make_module
from safetensors.torch import load_file

from tests.parity.diffusion.record_diffusers import fused_text, fused_unet
from tests.parity.diffusion.record_models import text_encoder, unet


def merged_by_lycoris(path: str) -> dict[str, torch.Tensor]:
    """Return the weights into which LyCORIS merges a file."""
    state, merged = load_file(path), {}
    models = {"lora_unet_": ("unet", unet()), "lora_te_": ("text_encoder", text_encoder())}
    for prefix, (component, model) in models.items():
        for name, layer in model.named_modules():
            local = f"text_model.{name}" if component != "unet" else name
            key = prefix + local.replace(".", "_")
            kind, parameters = get_module(state, key)
            if kind is not None:
                module = make_module(kind, parameters, key, layer)
                merged[f"{component}.{local}.weight"] = module.get_merged_weight()[0]
    return merged


def merged_by_diffusers(path: str) -> dict[str, torch.Tensor]:
    """Return the weights into which diffusers fuses a file."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = json.loads(header.get("__metadata__", {}).get("lora_adapter_metadata", "{}"))
    state, alphas = load_file(path), None
    if any(name.startswith("lora_unet_double") or "single_blocks" in name for name in state):
        state = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(state)
        for name in [name for name in state if "lora_A" in name]:
            module = "transformer." + name.split(".lora_A")[0].removeprefix("transformer.")
            state[f"{module}.weight"] = state[name.replace("lora_A", "lora_B")] @ state[name]
        merged = {name: x for name, x in state.items() if ".lora_" not in name}
    else:
        if not metadata:
            state = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(state, unet().config)
            convert = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers
            state, alphas = convert(state)
        merged = {f"unet.{n}": x for n, x in fused_unet(state, alphas, metadata or None).items()}
        text = fused_text(state, alphas, metadata)
        merged |= {f"text_encoder.text_model.{name}": x for name, x in text.items()}
    return merged


READERS = {"diffusers": merged_by_diffusers, "lycoris": merged_by_lycoris}


if __name__ == "__main__":
    with torch.no_grad():
        for path in sys.argv[2:]:
            merged = READERS[sys.argv[1]](path)
            np.savez(f"{path}.npz", **{name: x.detach().numpy() for name, x in merged.items()})
