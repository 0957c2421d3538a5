"""Draw modules of lycoris-lora 4.1.3 at random: the oracle of `check_random_lycoris.py`.

    python -m tests.parity.diffusion.record_random_lycoris FOLDER COUNT SEED [KIND ...]

with torch and lycoris-lora writes for each file `<n>.safetensors`, and in `<n>.npz` the weights of
its layers (`base/<name>`) and those that LyCORIS' `forward` uses instead (`merged/<name>`), both in
float64. The adapters' numbers are rounded to the file's dtype first, so nothing but arithmetic is
between the two.
"""

import pathlib
import random
import sys

import numpy as np
import torch
from lycoris.modules import (
    ButterflyOFTModule,
    DiagOFTModule,
    FullModule,
    GLoRAModule,
    IA3Module,
    LoConModule,
    LohaModule,
    LokrModule,
    NormModule,
)
from safetensors.torch import save_file
from torch import nn

KINDS = {
    "locon": LoConModule,
    "loha": LohaModule,
    "lokr": LokrModule,
    "full": FullModule,
    "ia3": IA3Module,
    "oft": DiagOFTModule,
    "boft": ButterflyOFTModule,
    "glora": GLoRAModule,
}
#: What a file's names begin with, and the component; the last may have no dots after it.
PREFIXES = {
    "lora_unet_": "unet",
    "lycoris_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_transformer_": "transformer",
    "diffusion_model.": "transformer",
    "unet.": "unet",
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def layer(rng: random.Random) -> nn.Module:
    """Return a linear layer or a convolution of 1 to 3 dimensions."""
    size = lambda: rng.choice((1, 2, 3, 4, 6, 7, 8, 12, 16))
    if rng.random() < 0.5:
        return nn.Linear(size(), size(), bias=rng.random() < 0.7)
    groups = rng.choice((1, 1, 1, 2))
    kind = rng.choice((nn.Conv2d, nn.Conv2d, nn.Conv1d, nn.Conv3d))
    return kind(
        groups * size(),
        groups * size(),
        rng.choice((1, 3, 3, 2)),
        stride=rng.choice((1, 2)),
        groups=groups,
        bias=rng.random() < 0.7,
    )


def options(rng: random.Random) -> dict:
    """Return the arguments of a module; each algorithm takes what it knows."""
    return {
        "lora_dim": rng.choice((1, 2, 3, 4, 20)),
        "alpha": rng.choice((None, 0, 1, 0.5, 4, 3.0)),
        "use_tucker": rng.random() < 0.4,
        "use_scalar": rng.random() < 0.2,
        "rs_lora": rng.random() < 0.2,
        "weight_decompose": rng.random() < 0.35,
        "wd_on_out": rng.random() < 0.6,
        "factor": rng.choice((-1, 1, 2, 4, 8)),
        "decompose_both": rng.random() < 0.4,
        "full_matrix": rng.random() < 0.2,
        "unbalanced_factorization": rng.random() < 0.3,
        "bypass_mode": rng.random() < 0.3,
        "train_on_input": rng.random() < 0.5,
        "constraint": rng.choice((0, 0, 0.01, 0.5)),
        "rescaled": rng.random() < 0.4,
    }


def draw(name: str, rng: random.Random, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, str]:
    """Return a layer, a module around it with numbers that the dtype holds, and what it is."""
    if rng.random() < 0.1:
        width = rng.choice((2, 4, 6))
        base, kind, given = rng.choice((nn.LayerNorm(width), nn.GroupNorm(2, width))), "norm", {}
        module = NormModule(name, base)
    else:
        base, kind, given = layer(rng), rng.choice(sys.argv[4:] or list(KINDS)), options(rng)
        if kind in ("full", "ia3"):
            given["bypass_mode"] = False
        module = KINDS[kind](name, base, **given)
    generator = torch.Generator().manual_seed(rng.randrange(10**9))
    for own in (*base.parameters(), *module.parameters()):
        own.data = 0.5 * torch.randn(own.shape, generator=generator)
    for own in module.parameters():
        own.data = own.data.to(dtype).to(torch.float32)
    if hasattr(module, "dora_scale"):
        module.dora_scale.data = (module.dora_scale.abs() + 0.5).to(dtype).float()
    if isinstance(module, FullModule):
        module._org_weight = [base.weight.data.clone()]
        module.org_bias = [base.bias.data.clone()] if base.bias is not None else None
    return base, module, f"{kind} {given}"


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors that LyCORIS saves of a module."""
    if isinstance(module, FullModule):  # which is not applied here
        found = {"diff": module.weight.data}
        return found | ({} if module.bias is None else {"diff_b": module.bias.data})
    if isinstance(module, NormModule):
        return {"w_norm": module.w_norm.data, "b_norm": module.b_norm.data}
    return dict(module.state_dict())


def merged(base: nn.Module, module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that the layer uses: base and what `forward` hands to the operation."""
    dtype = torch.float64
    if isinstance(module, DiagOFTModule | ButterflyOFTModule):  # whose inverse is of float32 only
        dtype = torch.float32
    base, module = base.to(dtype), module.to(dtype)
    if isinstance(module, NormModule):
        weight, bias = module.make_weight()
        return {"weight": weight, "bias": bias}
    if isinstance(module, FullModule):
        found = {"weight": base.weight + module.weight}
        return found | ({} if module.bias is None else {"bias": base.bias + module.bias})
    deltas = []
    module.eval()
    bypass, module.bypass_mode = module.bypass_mode, False
    module.op, op = (
        (lambda x, *weight, **kw: deltas.append(kw.get("weight", *weight[:1])) or 0),
        module.op,
    )
    module.org_forward = lambda x, *args: 0
    module(torch.zeros(1, dtype=dtype))
    (delta,) = deltas
    found = {"weight": base.weight + delta.reshape(base.weight.shape)}
    module.op, module.org_forward = op, base.forward
    if bypass and isinstance(base, nn.Linear) and not getattr(module, "wd", False):
        eye = torch.eye(base.in_features, dtype=dtype)
        if not isinstance(module, DiagOFTModule | ButterflyOFTModule):  # these turn the bias too
            got = (module.bypass_forward(eye) - module.bypass_forward(0 * eye)).T
            assert (got - found["weight"]).abs().max() < 1e-5, type(module)
    return found


def one(key: str, rng: random.Random, dtype: torch.dtype) -> tuple[dict, dict, dict, str]:
    """Return a module's tensors in a file, its layer's own, those that are used, and what it is."""
    base, module, note = draw(key, rng, dtype)
    tensors = {
        field: x.clone() if field in ("alpha", "on_input") else x.to(dtype)
        for field, x in state(module).items()
    }
    if isinstance(getattr(module, "scalar", None), nn.Parameter):  # a part of a factor in the file
        for field, x in tensors.items():
            if field != "alpha":
                module.get_parameter(field).data = x.float()
        module.scalar.data.fill_(1)
    if getattr(module, "use_w1", False) and module.use_w2:
        module.scale = 1  # as all readers have it; with rs_lora that is not the scale of training
    if isinstance(module, GLoRAModule):  # whose files do not say rs_lora, which its reader ignores
        module.scale = float(module.alpha) / module.lora_dim
    was = {leaf: x.detach().double().numpy().copy() for leaf, x in base.named_parameters()}
    used = {leaf: x.detach().double().numpy() for leaf, x in merged(base, module).items()}
    note = f"{key}: {type(base).__name__} {tuple(base.weight.shape)} {note}"
    return tensors, was, used, note


def main() -> None:
    folder, count, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for n in range(count):
        rng = random.Random(f"{seed} {n}")
        prefix = rng.choice(list(PREFIXES))
        component, dtype = PREFIXES[prefix], rng.choice(DTYPES)
        tensors, arrays, notes = {}, {}, []
        for i in range(rng.randrange(1, 5)):
            local = f"blocks.{i}.{rng.choice(('attn_one.to_q', 'conv', 'ff.net.0.proj'))}"
            key = prefix + (local if prefix.endswith(".") else local.replace(".", "_"))
            try:
                own, was, used, note = one(key, rng, dtype)
            except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
                print(f"{n}: LyCORIS refuses: {str(error)[:90]}")
                continue
            notes.append(note)
            tensors |= {f"{key}.{field}": x.detach().contiguous() for field, x in own.items()}
            arrays |= {f"base/{component}.{local}.{leaf}": x for leaf, x in was.items()}
            arrays |= {f"merged/{component}.{local}.{leaf}": x for leaf, x in used.items()}
        if tensors:
            save_file(tensors, folder / f"{n}.safetensors")
            np.savez(folder / f"{n}.npz", **arrays)
            (folder / f"{n}.txt").write_text("\n".join(notes))


if __name__ == "__main__":
    with torch.no_grad():
        main()
