"""Record LoRA files of lycoris-lora 4.1.3 and diffusers 0.42.1: the oracles of test_diffusion.py.

    python -m tests.parity.diffusion.record_diffusion [diffusers|lycoris FILE ...]

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

With files it loads them with one of the two instead, and writes the merged weights to FILE.npz.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.loaders import (
    StableDiffusionLoraLoaderMixin,
    lora_conversion_utils,
    single_file_utils,
)
from diffusers.utils.state_dict_utils import convert_state_dict_to_peft
from lycoris.modules import (
    FullModule,
    LoConModule,
    LohaModule,
    LokrModule,
    NormModule,
    get_module,
    make_module,
)
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

FILE = pathlib.Path(__file__).parent / "diffusion.npz"
BLOCK = "down_blocks.1.attentions.0"
LINEAR = (
    f"{BLOCK}.transformer_blocks.0.attn1.to_q",
    f"{BLOCK}.transformer_blocks.0.attn1.to_out.0",
    f"{BLOCK}.transformer_blocks.0.attn2.to_k",
    f"{BLOCK}.transformer_blocks.0.ff.net.0.proj",
)
CONV = ("down_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut", f"{BLOCK}.proj_in")
UP = (
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.0.attentions.2.proj_out",
    "mid_block.resnets.1.conv2",
)
NORMS = ("down_blocks.0.resnets.0.norm1",)
TEXT = tuple(
    f"encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
)
#: The names that kohya's trainer gives these modules in its U-Net of SDXL.
ORIGINAL = {
    f"{BLOCK}.": "input_blocks.4.1.",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "up_blocks.0.resnets.0.conv_shortcut": "output_blocks.0.0.skip_connection",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.0.attentions.2.": "output_blocks.2.1.",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
}


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        cross_attention_dim=6,
        attention_head_dim=2,
    )


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 4, "intermediate_size": 8, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=9, num_hidden_layers=1, **sizes))


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        value.data = 0.5 * torch.randn(value.shape, generator=generator)


# LyCORIS

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
}


def lycoris(case: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a file's tensors, and the weights that the adapted layers use."""
    kind, names, options = LYCORIS[case]
    model, tensors, merged = unet(), {}, {}
    for i, name in enumerate(names):
        layer = model.get_submodule(name)
        key = f"lora_unet_{name.replace('.', '_')}"
        module = kind(key, layer, **options)
        randomize(module, i)
        for field, value in (
            module.custom_state_dict().items()
            if kind is not NormModule
            else (
                ("w_norm", module.w_norm),
                ("b_norm", module.b_norm),
            )
        ):
            tensors[f"{key}.{field}"] = value.detach().clone().contiguous()
        if kind is FullModule:
            module._org_weight = [layer.weight.data.clone()]
            tensors[f"{key}.diff"] = module.weight.detach().clone()
            merged[f"{name}.weight"] = layer.weight + module.weight
            if module.bias is not None:
                tensors[f"{key}.diff_b"] = module.bias.detach().clone()
                merged[f"{name}.bias"] = layer.bias + module.bias
            continue
        if kind is NormModule:
            merged[f"{name}.weight"], merged[f"{name}.bias"] = module.make_weight()
            continue
        if kind is LoConModule:
            merged[f"{name}.weight"] = module.get_merged_weight()[0]
        else:
            total = layer.weight + module.get_weight(module.shape)
            merged[f"{name}.weight"] = module.apply_weight_decompose(total) if module.wd else total
        if isinstance(layer, torch.nn.Linear):  # as the layer itself computes it
            eye = torch.eye(layer.in_features)
            bias = 0 if layer.bias is None else layer.bias
            module.org_forward = layer.forward
            used = (module(eye) - bias).T
            assert (used - merged[f"{name}.weight"]).abs().max() < 1e-5
    return tensors, merged


# diffusers


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


def modules() -> dict[str, str]:
    """Return the modules of the published models as lines of JSON."""
    with torch.device("meta"):
        models = {
            "sd15 unet": UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8),
            "sd21 unet": UNet2DConditionModel(
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            ),
            "sd21 text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=1024,
                    intermediate_size=4096,
                    num_hidden_layers=23,
                    num_attention_heads=16,
                )
            ),
            "sdxl unet": UNet2DConditionModel(
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=2048,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "flux transformer": FluxTransformer2DModel(guidance_embeds=True),
            "sdxl text_encoder": CLIPTextModel(
                CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072)
            ),
            "sdxl text_encoder_2": CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=1280,
                    intermediate_size=5120,
                    num_hidden_layers=32,
                    num_attention_heads=20,
                    projection_dim=1280,
                )
            ),
        }
    return {name: json.dumps(listed(model)) for name, model in models.items()}


def listed(model: torch.nn.Module) -> list:
    kinds = {"Linear": "linear", "Conv2d": "conv", "Embedding": "embedding"}
    start = "text_model." if type(model) is CLIPTextModel else ""  # files have it, this class not
    return sorted(
        [
            start + name,
            kinds.get(type(x).__name__, "norm"),
            list(x.weight.shape),
            x.bias is not None,
        ]
        if hasattr(x, "bias")
        else [start + name, kinds.get(type(x).__name__, "norm"), list(x.weight.shape), False]
        for name, x in model.named_modules()
        if getattr(x, "weight", None) is not None
    )


def original_modules(multiples: tuple[int, ...], attention: tuple[int, ...]) -> list[str]:
    """List modules as the original code makes them: `channel_mult`, `attention_resolutions`."""
    resnet = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    transformer = ("norm", "proj_in", "transformer_blocks.0.attn2.to_v", "proj_out")
    names = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    inside = lambda at, leaves: [f"{at}.{leaf}" for leaf in leaves]
    number, scale = 1, 1
    for level in range(len(multiples)):
        for layer in range(2):
            shortcut = ["skip_connection"] * (
                level > 0 and not layer and multiples[level] != multiples[level - 1]
            )
            names += inside(f"input_blocks.{number}.0", (*resnet, *shortcut))
            if scale in attention:
                names += inside(f"input_blocks.{number}.1", transformer)
            number += 1
        if level < len(multiples) - 1:
            names.append(f"input_blocks.{number}.0.op")
            number, scale = number + 1, scale * 2
    names += inside("middle_block.0", resnet) + inside("middle_block.2", resnet)
    names += inside("middle_block.1", transformer)
    number = 0
    for level in reversed(range(len(multiples))):
        for layer in range(3):
            names += inside(f"output_blocks.{number}.0", (*resnet, "skip_connection"))
            if scale in attention:
                names += inside(f"output_blocks.{number}.1", transformer)
            if level and layer == 2:
                names.append(f"output_blocks.{number}.{1 + (scale in attention)}.conv")
                scale //= 2
            number += 1
    return names


def converted_originals(names: list[str], config: dict) -> str:
    """Return pairs of the original's and diffusers' names of modules, as JSON."""
    marked = {
        f"model.diffusion_model.{n}.{x}": torch.tensor(float(i))
        for i, n in enumerate(names)
        for x in ("weight", "bias")
    }
    config = {"layers_per_block": 2, "class_embed_type": None, "num_class_embeds": None} | config
    found = single_file_utils.convert_ldm_unet_checkpoint(marked, config)
    back = {int(x): name.rpartition(".")[0] for name, x in found.items()}
    return json.dumps([[name, back[i]] for i, name in enumerate(names)])


def originals() -> dict[str, str]:
    added = ["label_emb.0.0", "label_emb.0.2"]
    return {
        "sd15": converted_originals(
            original_modules((1, 2, 4, 4), (4, 2, 1)), {"addition_embed_type": None}
        ),
        "sdxl": converted_originals(
            original_modules((1, 2, 4), (4, 2)) + added, {"addition_embed_type": "text_time"}
        ),
    }


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
        if len(sys.argv) == 1:
            record()
        for path in sys.argv[2:]:
            merged = READERS[sys.argv[1]](path)
            np.savez(f"{path}.npz", **{name: x.detach().numpy() for name, x in merged.items()})
