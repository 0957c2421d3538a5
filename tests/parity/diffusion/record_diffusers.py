"""Files of kohya's and diffusers' names, and the weights that diffusers 0.42.1 fuses."""

import pathlib
import tempfile

import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, lora_conversion_utils
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict

from tests.parity.diffusion.record_models import (
    CONV,
    LINEAR,
    ORIGINAL,
    TEXT,
    UP,
    text_encoder,
    unet,
)


def factors(names, prefix: str, style: str, seed: int, dora: bool = False):
    """Return tensors of the named layers in one of the styles of names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i, name in enumerate(names):
        text = name.startswith("encoder.")
        layer = (text_encoder() if text else unet()).get_submodule(name)
        out, ins, *kernel = layer.weight.shape
        rank = 2 + i % 2
        draw = lambda *shape: 0.5 * torch.randn(shape, generator=generator)
        down, up = draw(rank, ins, *kernel), draw(out, rank, *[1] * len(kernel))
        name = f"text_model.{name}" if text else name
        if style == "kohya":
            key = f"{prefix}_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(3.0)
            if dora:
                tensors[f"{key}.dora_scale"] = draw(out).abs() + 0.5  # as diffusers needs it
        elif style == "processors":
            old = name.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
            for field, x in (("down", down), ("up", up)):
                tensors[f"{prefix}.{old}_lora.{field}.weight"] = x
        else:
            for field, x in (("down", down), ("up", up)):
                tensors[f"{prefix}.{name}.lora_linear_layer.{field}.weight"] = x
    return tensors


def to_original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {}
    for name, x in tensors.items():
        for ours, theirs in ORIGINAL.items():
            name = name.replace(
                f"lora_unet_{ours.replace('.', '_')}", f"lora_unet_{theirs.replace('.', '_')}"
            )
        found[name] = x
    return found


def fused_unet(tensors, alphas=None, metadata=None) -> dict[str, torch.Tensor]:
    """Return the weights of a U-Net into which diffusers fused the tensors."""
    model = unet()
    tensors = {name: x for name, x in tensors.items() if name.startswith("unet.")}
    if not tensors:
        return {}
    alphas = {n: x for n, x in (alphas or {}).items() if n.startswith("unet.")} or None
    model.load_lora_adapter(dict(tensors), prefix="unet", network_alphas=alphas, metadata=metadata)
    model.fuse_lora()
    return fused_weights(model)


def fused_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): x
        for name, x in model.state_dict().items()
        if name.endswith(".base_layer.weight")
    }


def fused_text(tensors, alphas=None, metadata=None) -> dict[str, torch.Tensor]:
    """Return the weights of the text encoder, by diffusers' own names of the factors."""
    config = {key: (metadata or {}).get(f"text_encoder.{key}", 1) for key in ("lora_alpha", "r")}
    start = "text_encoder."
    own = {n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)}
    if not own:
        return {}
    own = own if any("lora_A" in name for name in own) else convert_state_dict_to_peft(own)
    merged, model = {}, text_encoder()
    for name, a in own.items():
        if "lora_A" not in name:
            continue
        module, b = name.split(".lora_A")[0], own[name.replace("lora_A", "lora_B")]
        found = [x for n, x in (alphas or {}).items() if n.startswith(start) and _same(module, n)]
        scale = found[0] / len(a) if found else config["lora_alpha"] / config["r"]
        local = module.removeprefix("text_model.")
        merged[f"{local}.weight"] = model.get_submodule(local).weight + scale * b @ a
    return merged


def _same(module: str, name: str) -> bool:
    """Whether an alpha of diffusers' converter is this module's."""
    old = module
    for one in ("q", "k", "v", "out"):
        old = old.replace(f"{one}_proj", f"to_{one}_lora")
    return f".{old}." in name or f".{module}." in name


def kohya(case: str):
    layers = LINEAR + CONV + UP
    if case == "kohya dora":
        tensors = factors(LINEAR, "lora_unet", "kohya", 2, dora=True)
    else:
        text = {"kohya": "lora_te", "kohya original": "lora_te1"}[case]
        tensors = factors(layers, "lora_unet", "kohya", 2) | factors(TEXT, text, "kohya", 3)
    written = to_original(tensors) if case == "kohya original" else dict(tensors)
    convert = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers
    state = convert(dict(written), unet().config)
    state, alphas = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(state)
    return written, state, alphas


def peft(case: str) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return a file that diffusers writes, and the weights that it fuses."""
    model = unet()
    names = LINEAR + (() if "dora" in case else CONV)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=list(names),
        rank_pattern={LINEAR[0]: 3},
        alpha_pattern={LINEAR[0]: 5},
        use_dora="dora" in case,
    )
    model.add_adapter(config)
    for i, (name, value) in enumerate(model.named_parameters()):
        if "lora_" in name:
            value.data = 0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
    with tempfile.TemporaryDirectory() as folder:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder,
            unet_lora_layers=get_peft_model_state_dict(model),
            unet_lora_adapter_metadata=json_ready(model.peft_config["default"].to_dict()),
        )
        data = (pathlib.Path(folder) / "pytorch_lora_weights.safetensors").read_bytes()
    model.fuse_lora()
    return data, fused_weights(model)


def json_ready(values):
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
