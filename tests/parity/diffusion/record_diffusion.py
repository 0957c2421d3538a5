"""Record LoRA files of lycoris-lora 4.1.3 and diffusers 0.42.1: the oracles of test_diffusion.py.

    python -m tests.parity.diffusion.record_diffusion

with torch, peft 0.21.2, transformers, lycoris-lora and diffusers writes `diffusion.npz`:

    base                   weights of a few modules of a tiny U-Net and a text encoder
    <case>/file            an adapter file
    <case>/merged          the weights with the adapter, from the library; of Flux the changes
    modules/<component>    the modules of the published models: name, kind, shape and bias
    originals/<model>      names of the original U-Net, and what diffusers' converter of its
                           checkpoints makes of them

The first three are bytes of safetensors files, with diffusers' names of the weights, the others
JSON.

LyCORIS' weights are those of its `forward`. Its `get_diff_weight` multiplies LoHa and LoKr by the
scale twice in 4.1.3, which none of its layers' outputs show.

diffusers' own loader drops the alpha of attention layers that differs from the most common one (its
`alpha_pattern` has the names of processors), so all alphas of kohya's files are the same here.
"""

import pathlib

import numpy as np
import torch
from safetensors.torch import save

from tests.parity.diffusion.record_diffusers import factors, fused_text, fused_unet, kohya, peft
from tests.parity.diffusion.record_flux import flux
from tests.parity.diffusion.record_lycoris import LYCORIS, lycoris
from tests.parity.diffusion.record_models import CONV, LINEAR, NORMS, TEXT, UP, text_encoder, unet
from tests.parity.diffusion.record_modules import modules, originals

FILE = pathlib.Path(__file__).parent / "diffusion.npz"


def record() -> None:
    arrays = {}

    def add(case: str, data: bytes, merged: dict[str, torch.Tensor]) -> None:
        arrays[f"{case}/file"] = np.frombuffer(data, np.uint8)
        arrays[f"{case}/merged"] = np.frombuffer(save(whole(merged)), np.uint8)

    whole = lambda named: {name: x.detach().clone().contiguous() for name, x in named.items()}
    base = {
        f"unet.{name}.{leaf}": x
        for name in (*LINEAR, *CONV, *UP, *NORMS)
        for leaf, x in unet().get_submodule(name).named_parameters()
    } | {
        f"text_encoder.text_model.{name}.weight": text_encoder().get_submodule(name).weight
        for name in TEXT
    }
    arrays["base"] = np.frombuffer(save(whole(base)), np.uint8)
    under = lambda prefix, named: {f"{prefix}.{name}": x for name, x in named.items()}
    for case in LYCORIS:
        tensors, merged = lycoris(case)
        add(case, save(tensors), under("unet", merged))
    for case in ("kohya", "kohya original", "kohya dora"):
        tensors, state, alphas = kohya(case)
        merged = under("unet", fused_unet(state, alphas))
        merged |= under("text_encoder.text_model", fused_text(state, alphas))
        add(case, save(tensors), merged)
    old = factors(LINEAR[:3], "unet", "processors", 6)
    text = factors(TEXT, "text_encoder", "linear layers", 7)
    merged = under("unet", fused_unet(old)) | under("text_encoder.text_model", fused_text(text))
    add("older diffusers", save(old | text), merged)
    for case in ("diffusers", "diffusers dora"):
        data, merged = peft(case)
        add(case, data, under("unet", merged))
    tensors, changes = flux()
    add("flux", save(tensors), changes)
    for name, text in modules().items():
        arrays[f"modules/{name}"] = np.frombuffer(text.encode(), np.uint8)
    for name, text in originals().items():
        arrays[f"originals/{name}"] = np.frombuffer(text.encode(), np.uint8)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    with torch.no_grad():
        record()
