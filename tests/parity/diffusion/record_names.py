"""Record what diffusers 0.42.1 makes of other programs' names: the oracle of test_styles.py.

    python -m tests.parity.diffusion.record_names

with torch and diffusers writes `names.npz`: for each style of names `<style>/file`, a LoRA file,
and `<style>/changes`, the changes of the weights under diffusers' names, both as bytes of
safetensors files. The changes are B·A of what `lora_conversion_utils` returns. For Stable
Diffusion 3, of which it knows no file, and for Flux.2's last layer, whose halves it forgets to
swap, they are what `single_file_utils` makes of them as weights of a checkpoint.

Only the numbers of outputs are a model's own, where the converter insists on them.
"""

import pathlib
import re
from collections.abc import Callable

import numpy as np
import torch
from diffusers.loaders import lora_conversion_utils as convert
from diffusers.loaders import single_file_utils
from safetensors.torch import save

FILE = pathlib.Path(__file__).parent / "names.npz"
Tensors = dict[str, torch.Tensor]
_DOUBLE = ("img_attn", "txt_attn")
_QKV, _FUSED = 12, 3 * 3072 + 24  # outputs of q, k and v; of Flux's first layer of a single block


def factors(
    outs: dict[str, int], prefix: str, ends: tuple[str, str], alpha: bool = False
) -> Tensors:
    """Return random factors of modules with so many outputs."""
    generator = torch.Generator().manual_seed(len(prefix) + len(outs))
    flat, found = prefix.endswith("_"), {}
    for i, (name, out) in enumerate(outs.items()):
        rank, few = 1 + i % 2, min(out, 12)
        key = prefix + (name.replace(".", "_") if flat else name)
        up = torch.randn(few, rank, generator=generator).round(decimals=2)
        up = torch.cat([up.repeat(out // few, 1), up[: out % few]])
        found[f"{key}{ends[0]}.weight"] = torch.randn(rank, 3 + i % 2, generator=generator)
        found[f"{key}{ends[1]}.weight"] = up
        if alpha:
            found[f"{key}.alpha"] = torch.tensor(1.0 + i % 3)
    return found


PEFT, KOHYA = (".lora_A", ".lora_B"), (".lora_down", ".lora_up")


def products(converted: Tensors) -> Tensors:
    """Return B·A of each module."""
    found = {}
    for name, a in converted.items():
        if ".lora_A.weight" in name:
            module = name.removesuffix(".lora_A.weight")
            b = converted[f"{module}.lora_B.weight"]
            found[f"transformer.{module.removeprefix('transformer.')}.weight"] = b @ a
    return found


def flux_blocks(width: dict[str, int], single: dict[str, int]) -> dict[str, int]:
    return {f"double_blocks.1.{n}": out for n, out in width.items()} | {
        f"single_blocks.1.{n}": out for n, out in single.items()
    }


def x_labs() -> tuple[Tensors, Tensors]:
    outs = {f"double_blocks.1.processor.{x}_lora{n}": 12 for x in ("qkv", "proj") for n in (1, 2)}
    outs |= {f"single_blocks.1.processor.{x}_lora": 12 for x in ("qkv", "proj")}
    tensors = factors(outs, "", (".down", ".up"))
    return tensors, products(convert._convert_xlabs_flux_lora_to_diffusers(dict(tensors)))


def control() -> tuple[Tensors, Tensors]:
    """Return a control LoRA of Black Forest Labs; only one block of each kind is kept."""
    names = ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2", "img_mod.lin")
    double = [name.replace("img", side, 1) for side in ("img", "txt") for name in names]
    outs = {f"double_blocks.{i}.{name}": _QKV for i in range(19) for name in double}
    for i in range(38):
        outs |= {f"single_blocks.{i}.{x}": 12 for x in ("linear2", "modulation.lin")}
        outs[f"single_blocks.{i}.linear1"] = 3 * 3072 + 12288
    for name in ("time_in", "vector_in", "guidance_in"):
        outs |= {f"{name}.{side}_layer": 4 for side in ("in", "out")}
    outs |= {"img_in": 4, "txt_in": 4, "final_layer.linear": 4, "final_layer.adaLN_modulation.1": 8}
    tensors = factors(outs, "", PEFT)
    tensors |= {n.replace(".weight", ".bias"): x[:, 0] for n, x in tensors.items() if "lora_B" in n}
    for i in range(19):
        for side in _DOUBLE:
            for x in ("query", "key"):
                tensors[f"double_blocks.{i}.{side}.norm.{x}_norm.scale"] = torch.rand(4)
    for i in range(38):
        for x in ("query", "key"):
            tensors[f"single_blocks.{i}.norm.{x}_norm.scale"] = torch.rand(4)
    given = dict(tensors)
    last = "final_layer.adaLN_modulation.1.lora_A.weight"
    given[last] = given[last].flip(0)  # of rank 2: the converter swaps A's halves as well as B's
    converted = convert._convert_bfl_flux_control_lora_to_diffusers(given)
    changes = products(converted)
    for name, x in converted.items():
        if name.endswith(".lora_B.bias"):
            changes[name.replace(".lora_B", "")] = x
        elif ".norm_" in name and name.endswith(".weight") and "lora" not in name:
            changes[name] = x
    few = re.compile(r"blocks\.(?!1\.)\d")
    start = lambda name: "transformer." + name.removeprefix("transformer.")
    return (
        {name: x for name, x in tensors.items() if not few.search(name)},
        {start(name): x for name, x in changes.items() if not few.search(name)},
    )


def wan(prefix: str, ends: tuple[str, str], convert_: Callable) -> tuple[Tensors, Tensors]:
    outs = {
        f"blocks.0.{kind}_attn.{x}": 4
        for kind in ("self", "cross")
        for x in (*"qkvo", *(("k_img", "v_img") if kind == "cross" else ()))
    }
    outs |= {"blocks.0.ffn.0": 8, "blocks.0.ffn.2": 4}
    flat = prefix.endswith("_")
    if not flat:
        outs |= {f"{x}_embedding.{n}": 4 for x in ("text", "time") for n in (0, 2)}
        outs |= {"time_projection.1": 6, "head.head": 4, "img_emb.proj.1": 4, "img_emb.proj.3": 4}
    tensors = factors(outs, prefix, ends, alpha=flat)
    return tensors, products(convert_(dict(tensors)))


def hunyuan() -> tuple[Tensors, Tensors]:
    names = ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear")
    double = {f"{side}_{name}": _QKV for side in ("img", "txt") for name in names}
    outs = flux_blocks(double, {"linear1": _FUSED, "linear2": 4, "modulation.linear": 4})
    refiner = ("self_attn_qkv", "self_attn_proj", "mlp.fc1", "mlp.fc2")
    outs |= {f"txt_in.individual_token_refiner.blocks.0.{x}": 12 for x in refiner}
    outs |= {f"{x}_in.mlp.{n}": 4 for x in ("time", "guidance") for n in (0, 2)}
    outs |= {"vector_in.in_layer": 4, "vector_in.out_layer": 4, "txt_in.input_embedder": 4}
    outs |= {"txt_in.t_embedder.mlp.0": 4, "txt_in.c_embedder.linear_1": 4}
    outs |= {"final_layer.linear": 4}
    tensors = factors(outs, "diffusion_model.", PEFT)
    qkv = [n for n in tensors if "self_attn_qkv.lora_A" in n]  # which the converter would cut
    changes = convert._convert_hunyuan_video_lora_to_diffusers(
        {n: torch.cat([x] * 3) if n in qkv else x for n, x in tensors.items()}
    )
    return tensors, products(changes)


def lumina() -> tuple[Tensors, Tensors]:
    outs = {}
    for kind in ("layers", "noise_refiner", "context_refiner"):
        outs |= {f"{kind}.0.attention.qkv": 2304 + 768 + 768, f"{kind}.0.attention.out": 4}
        outs |= {f"{kind}.0.feed_forward.w{n}": 4 for n in (1, 2, 3)}
        if kind != "context_refiner":
            outs[f"{kind}.0.adaLN_modulation.1"] = 4
    tensors = factors(outs, "diffusion_model.", PEFT)
    return tensors, products(convert._convert_non_diffusers_lumina2_lora_to_diffusers(tensors))


def z_image() -> tuple[Tensors, Tensors]:
    outs = {"layers.0.attention.qkv": 12, "layers.0.attention.out": 4}
    outs |= {f"layers.0.feed_forward.w{n}": 4 for n in (1, 2, 3)}
    outs["noise_refiner.1.adaLN_modulation.0"] = 4
    tensors = factors(outs, "lora_unet_", (".lora.down", ".lora.up"), alpha=True)
    return tensors, products(convert._convert_non_diffusers_z_image_lora_to_diffusers(tensors))


def qwen() -> tuple[Tensors, Tensors]:
    outs = {f"transformer_blocks.0.attn.{x}": 4 for x in ("to_q", "to_out.0", "add_k_proj")}
    outs |= {f"transformer_blocks.0.{x}": 4 for x in ("img_mod.1", "txt_mlp.net.0.proj")}
    outs |= {"img_in": 4, "norm_out.linear": 8, "time_text_embed.timestep_embedder.linear_2": 4}
    tensors = factors(outs, "lora_unet_", KOHYA, alpha=True)
    return tensors, products(convert._convert_non_diffusers_qwen_lora_to_diffusers(tensors))


def flux2(flat: bool) -> tuple[Tensors, Tensors]:
    names = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    double = {f"{side}_{name}": _QKV for side in ("img", "txt") for name in names}
    outs = flux_blocks(double, {"linear1": 24, "linear2": 4})
    outs |= {"img_in": 4, "txt_in": 4, "time_in.in_layer": 4, "final_layer.linear": 4}
    if flat:
        tensors = factors(outs, "lora_unet_", KOHYA, alpha=True)
        return tensors, products(convert._convert_kohya_flux2_lora_to_diffusers(dict(tensors)))
    modulations = ("single_stream_modulation", "double_stream_modulation_img")
    outs |= {"guidance_in.out_layer": 4} | {f"{x}.lin": 6 for x in modulations}
    tensors = factors(outs, "diffusion_model.", PEFT)
    changes = products(convert._convert_non_diffusers_flux2_lora_to_diffusers(tensors))
    last = factors({"final_layer.adaLN_modulation.1": 8}, "diffusion_model.", PEFT)
    weights = single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers(as_weights(last))
    return tensors | last, changes | {f"transformer.{n}": x for n, x in weights.items()}


def as_weights(tensors: Tensors) -> Tensors:
    """Return the changes of factors as the weights of a checkpoint."""
    start = "transformer.diffusion_model."
    return {name.removeprefix(start): x for name, x in products(tensors).items()}


def flux2_lokr() -> tuple[Tensors, Tensors]:
    """Return LoKr of fused layers, which stay so; the change is a Kronecker product."""
    tensors, changes = {}, {}
    for name in ("double_blocks.1.img_attn.qkv", "double_blocks.1.txt_attn.qkv"):
        key = f"diffusion_model.{name}"
        tensors |= {f"{key}.lokr_w1": torch.rand(2, 1), f"{key}.lokr_w2_a": torch.rand(6, 1)}
        tensors |= {f"{key}.lokr_w2_b": torch.rand(1, 3), f"{key}.alpha": torch.tensor(0.5)}
    converted = convert._convert_non_diffusers_flux2_lokr_to_diffusers(dict(tensors))
    for name, w1 in converted.items():
        if name.endswith("lokr_w1"):
            module = name.removesuffix(".lokr_w1")
            w2 = converted[f"{module}.lokr_w2_a"] @ converted[f"{module}.lokr_w2_b"]
            changes[f"{module}.weight"] = torch.kron(w1, w2)
    return tensors, changes


def sd3() -> tuple[Tensors, Tensors]:
    names = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    outs = {f"joint_blocks.0.{x}_block.{name}": 12 for x in ("x", "context") for name in names}
    outs |= {"joint_blocks.0.x_block.attn2.qkv": 12, "joint_blocks.0.x_block.attn2.proj": 4}
    outs |= {"joint_blocks.0.x_block.adaLN_modulation.1": 6, "final_layer.linear": 4}
    outs |= {f"{x}_embedder.mlp.{n}": 4 for x in "ty" for n in (0, 2)}
    outs |= {"context_embedder": 4, "final_layer.adaLN_modulation.1": 8}
    tensors = factors(outs, "diffusion_model.", PEFT)
    weights = as_weights(tensors)
    rest = ["joint_blocks.0.context_block.adaLN_modulation.1", "x_embedder.proj"]
    for i in (0, 1):  # the converter wants a last block, and biases
        for name in [x for x in outs if x.startswith("joint_blocks.0")] + rest[:1]:
            weights.setdefault(f"{name.replace('.0.', f'.{i}.', 1)}.weight", torch.zeros(12, 3))
    weights |= {"pos_embed": torch.zeros(1), "x_embedder.proj.weight": torch.zeros(4)}
    for name in [name for name in weights if name.endswith(".weight")]:
        weights[name.replace(".weight", ".bias")] = torch.zeros(len(weights[name]))
    weights |= {"context_embedder.weight": weights["context_embedder.weight"]}
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(weights)
    changes = {f"transformer.{n}": x for n, x in converted.items() if x.ndim == 2 and x.any()}
    return tensors, changes


STYLES = {
    "x-labs": x_labs,
    "flux control": control,
    "wan": lambda: wan(
        "diffusion_model.", PEFT, convert._convert_non_diffusers_wan_lora_to_diffusers
    ),
    "wan musubi": lambda: wan("lora_unet_", KOHYA, convert._convert_musubi_wan_lora_to_diffusers),
    "hunyuan video": hunyuan,
    "lumina 2": lumina,
    "z-image": z_image,
    "qwen-image": qwen,
    "flux 2": lambda: flux2(flat=False),
    "flux 2 kohya": lambda: flux2(flat=True),
    "flux 2 lokr": flux2_lokr,
    "sd 3": sd3,
}


def main() -> None:
    torch.manual_seed(0)
    arrays = {}
    for style, make in STYLES.items():
        tensors, changes = make()
        for part, named in (("file", tensors), ("changes", changes)):
            data = save({name: x.clone().contiguous() for name, x in named.items()})
            arrays[f"{style}/{part}"] = np.frombuffer(data, np.uint8)
        print(f"{style}: {len(tensors)} tensors, {len(changes)} weights")
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    with torch.no_grad():
        main()
