"""Files of lycoris-lora 4.1.3, and the weights that its layers use."""

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

from tests.parity.diffusion.record_models import CONV, LINEAR, NORMS, UP, randomize, unet

LYCORIS = {
    "locon": (LoConModule, LINEAR + CONV + UP, {"lora_dim": 2, "alpha": 1}),
    "locon tucker": (LoConModule, CONV, {"lora_dim": 2, "alpha": 3, "use_tucker": True}),
    "locon rslora": (LoConModule, LINEAR, {"lora_dim": 2, "alpha": 1, "rs_lora": True}),
    "locon dora": (LoConModule, LINEAR + CONV, {"lora_dim": 2, "weight_decompose": True}),
    "locon dora inputs": (
        LoConModule,
        LINEAR + CONV,
        {"lora_dim": 2, "weight_decompose": True, "wd_on_out": False},
    ),
    "loha": (LohaModule, LINEAR + CONV, {"lora_dim": 1, "alpha": 0.5}),
    "loha whole": (LohaModule, LINEAR + CONV, {"lora_dim": 2, "alpha": 1}),
    "loha tucker": (LohaModule, CONV, {"lora_dim": 1, "alpha": 0.5, "use_tucker": True}),
    "loha dora": (LohaModule, LINEAR + CONV, {"lora_dim": 2, "weight_decompose": True}),
    "lokr": (LokrModule, LINEAR + CONV, {"lora_dim": 1, "alpha": 0.5, "factor": 2}),
    "lokr both": (
        LokrModule,
        LINEAR[3:],
        {"lora_dim": 1, "alpha": 2, "factor": 4, "decompose_both": True},
    ),
    "lokr tucker": (
        LokrModule,
        CONV,
        {"lora_dim": 1, "alpha": 0.5, "factor": 1, "use_tucker": True},
    ),
    "lokr full": (LokrModule, LINEAR + CONV, {"alpha": 0.5, "factor": 2, "full_matrix": True}),
    "lokr dora": (LokrModule, LINEAR, {"lora_dim": 1, "factor": 2, "weight_decompose": True}),
    "full": (FullModule, LINEAR[3:] + CONV, {}),
    "norm": (NormModule, NORMS, {}),
    "ia3": (IA3Module, LINEAR + CONV, {}),
    "ia3 inputs": (IA3Module, LINEAR + CONV, {"train_on_input": True}),
    "oft": (DiagOFTModule, LINEAR + CONV, {"lora_dim": 2}),
    "oft rescaled": (DiagOFTModule, CONV, {"lora_dim": 2, "constraint": 0.1, "rescaled": True}),
    "boft": (ButterflyOFTModule, LINEAR, {"lora_dim": 2}),
    "glora": (GLoRAModule, LINEAR + CONV, {"lora_dim": 1, "alpha": 0.5}),
}
#: Those whose change is a function of the weight.
OF_BASE = (IA3Module, DiagOFTModule, ButterflyOFTModule, GLoRAModule)


def saved(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of one module in a file."""
    if isinstance(module, FullModule):  # which is not applied here
        found = {"diff": module.weight}
        return found | ({} if module.bias is None else {"diff_b": module.bias})
    if isinstance(module, NormModule):
        return {"w_norm": module.w_norm, "b_norm": module.b_norm}
    return dict(module.state_dict())


def used(module: torch.nn.Module, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that an adapted layer uses."""
    if isinstance(module, FullModule):
        found = {"weight": layer.weight + module.weight}
        return found | ({} if module.bias is None else {"bias": layer.bias + module.bias})
    if isinstance(module, NormModule):
        return dict(zip(("weight", "bias"), module.make_weight(), strict=True))
    if isinstance(module, (LoConModule, *OF_BASE)):
        weight = module.get_merged_weight()[0]
    else:
        total = layer.weight + module.get_weight(module.shape)
        weight = module.apply_weight_decompose(total) if module.wd else total
    if isinstance(layer, torch.nn.Linear):  # as the layer itself computes it
        module.org_forward, bias = layer.forward, 0 if layer.bias is None else layer.bias
        computed = (module(torch.eye(layer.in_features)) - bias).T
        assert (computed - weight).abs().max() < 1e-5
    return {"weight": weight}


def lycoris(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a file's tensors, and the weights that the adapted layers use."""
    kind, names, options = LYCORIS[case]
    model, tensors, merged = unet(), {}, {}
    for i, name in enumerate(names):
        layer = model.get_submodule(name)
        key = f"lora_unet_{name.replace('.', '_')}"
        module = kind(key, layer, **options)
        randomize(module, i)
        for field, value in saved(module).items():
            tensors[f"{key}.{field}"] = value.detach().clone().contiguous()
        merged |= {f"{name}.{leaf}": x for leaf, x in used(module, layer).items()}
    return tensors, merged
