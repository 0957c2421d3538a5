"""Record a tiny Llama, quantized by each library: tests/parity/quantized/recorded.

Run it where PyTorch, transformers, bitsandbytes and compressed-tensors are installed (recorded with
2.13.0, 5.24.0, 0.50.2 and 0.20.0), with the unpacked sources of GPTQModel 7.7.0 and AutoAWQ 0.2.9,
of which only the packing of linear layers is run (their packages need a GPU to be imported whole):
`python tests/parity/quantized/record_quantized.py GPTQMODEL_DIRECTORY AUTOAWQ_DIRECTORY`.

A directory per format contains config.json and model.safetensors. For each of them, `expected.json`
has the SHA-256 of what the library dequantizes each weight to, and `logits.npz` the logits of
transformers' float32 model with these weights. The weights of "fp8" are made from the written
definition with PyTorch's conversions, because transformers quantizes them on a GPU only; "gpt_oss"
has random codes, and the values are those of transformers.
"""

import copy
import hashlib
import importlib.abc
import importlib.machinery
import json
import pathlib
import shutil
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent / "recorded"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.25,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
IDS = torch.tensor([[3, 1, 4, 15, 9, 26]])
GROUP = 32


class Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stand in for what GPTQModel imports and does not need in order to pack a layer."""

    names = ("pcre", "logbar", "device_smi", "tokenicer", "threadpoolctl", "defuser", "datasets")

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__ = [], spec, spec.name
        return module

    def exec_module(self, module):
        pass


def package(name: str, directory: pathlib.Path, **attributes) -> None:
    """Make a package importable without its __init__.py."""
    module = types.ModuleType(name)
    module.__path__ = [str(directory)]
    vars(module).update(attributes)
    sys.modules[name] = module


def open_sources(gptqmodel: str, autoawq: str) -> None:
    sys.meta_path.append(Mocks())
    root = pathlib.Path(gptqmodel) / "gptqmodel"
    package("gptqmodel", root, DEBUG_ON=False)
    for name in ("nn_modules", "models"):
        package(f"gptqmodel.{name}", root / name)
    root = pathlib.Path(autoawq) / "awq"
    package("awq", root)
    for name in ("modules", "modules/linear", "utils"):
        package(f"awq.{name.replace('/', '.')}", root / name)


def bitsandbytes_4bit(quant_type: str, nested: bool, dtype: torch.dtype):
    import bitsandbytes as bnb

    def quantize(linear):
        made = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False,
            compress_statistics=nested, quant_type=quant_type,
        )  # fmt: skip
        weight = linear.weight.detach().to(dtype)
        made.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=nested, quant_type=quant_type,
            module=made,
        ).to("cpu")  # fmt: skip
        # as rows of one block: 0.50.2 dequantizes shorter rows wrongly on a CPU
        state = copy.copy(made.weight.quant_state)
        state.shape = torch.Size((weight.numel() // state.blocksize, state.blocksize))
        values = bnb.functional.dequantize_4bit(made.weight.data, state)
        return made.state_dict(), values.reshape(weight.shape)

    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }
    return quantize, config, dtype


def bitsandbytes_8bit():
    import bitsandbytes as bnb

    def quantize(linear):
        made = bnb.nn.Linear8bitLt(
            linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
        )
        made.weight = bnb.nn.Int8Params(
            linear.weight.detach().half(), requires_grad=False, has_fp16_weights=False
        ).to("cpu")
        values = bnb.functional.int8_vectorwise_dequant(made.weight.data, made.weight.SCB)
        return made.state_dict(), values.half()

    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}
    return quantize, config, torch.float16


def by_groups(weight: torch.Tensor, group: int, bits: int):
    """Return scales and zero points `[out, groups]` of an asymmetric quantization."""
    blocks = weight.reshape(weight.shape[0], -1, group)
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).half().float()
    zeros = torch.round(-low / scales).clamp(0, 2**bits - 1)
    return scales, zeros


def gptq(bits: int, layout: str, group: int, desc_act: bool = False):
    def quantize(linear):
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.backend import BACKEND
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

        size = linear.in_features
        per_group = size if group == -1 else group
        order = torch.arange(size)
        if desc_act:
            order = torch.argsort(linear.weight.detach().square().sum(0), descending=True)
        g_idx = torch.empty(size, dtype=torch.int32)
        g_idx[order] = (torch.arange(size) // per_group).to(torch.int32)
        scales, zeros = by_groups(linear.weight.detach()[:, order], per_group, bits)
        made = TorchLinear(
            bits=bits, group_size=group, sym=False, desc_act=desc_act, in_features=size,
            out_features=linear.out_features, bias=False, pack_dtype=torch.int32, adapter=None,
            backend=BACKEND.GPTQ_TORCH, register_buffers=False,
        )  # fmt: skip
        made.pack_block(linear, scales, zeros, g_idx)
        made.enable_wf_unsqueeze = True
        values = made.dequantize_weight().T.contiguous()
        if layout == "gptq":
            config = types.SimpleNamespace(bits=bits, pack_dtype=torch.int32)
            convert_gptq_v2_to_v1_format_module(made, config)
        names = ("qweight", "qzeros", "scales", "g_idx")
        return {name: getattr(made, name) for name in names}, values

    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": desc_act,
        "sym": False,
        "checkpoint_format": layout,
    }
    return quantize, config, torch.float16


def awq():
    def quantize(linear):
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils.packing_utils import dequantize_gemm

        scales, zeros = (x.T.contiguous() for x in by_groups(linear.weight.detach(), GROUP, 4))
        made = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales, zeros=zeros)
        values = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, GROUP)
        return made.state_dict(), values.T.contiguous()

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    }
    return quantize, config, torch.float16


def compressed(layout: str, dtype: torch.dtype = torch.bfloat16, activations: bool = False, **args):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights = QuantizationArgs(**args)
    inputs = QuantizationArgs(num_bits=8, type=weights.type, dynamic=True, strategy="token")
    scheme = QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=inputs if activations else None
    )
    compressor = BaseCompressor.get_value_from_registry(layout)

    def quantize(linear):
        weight = linear.weight.detach().to(dtype)
        out, size = weight.shape
        tall, wide = args.get("block_structure") or (1, args.get("group_size") or size)
        if args["strategy"] == "tensor":
            tall = out
        blocks = weight.reshape(out // tall, tall, size // wide, wide)
        divisor = None
        if args["strategy"] == "tensor_group":
            divisor = generate_gparam(weight.amin(), weight.amax())
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        scales, zeros = calculate_qparams(low, high, weights, global_scale=divisor)
        if args["strategy"] == "tensor":
            scales, zeros = scales.reshape(1), zeros.reshape(1)
        state = {"weight": weight, "weight_scale": scales}
        if divisor is not None:
            state["weight_global_scale"] = divisor
        if not weights.symmetric:
            state["weight_zero_point"] = zeros
        state = compressor.compress(state, scheme)
        return state, compressor.decompress(dict(state), scheme)["weight"]

    group = scheme.model_dump(mode="json")
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "format": layout}},
        "ignore": ["lm_head"],
    }
    return quantize, config, dtype


def fp8():
    """Return weights in FP8 with square blocks, as transformers' FineGrainedFP8Config has them."""

    def quantize(linear):
        weight = linear.weight.detach()
        out, size = weight.shape
        scales = weight.reshape(out // 16, 16, size // 16, 16).abs().amax((1, 3)) / 448
        spread = scales.repeat_interleave(16, 0).repeat_interleave(16, 1)
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread

    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }
    return quantize, config, torch.float32


ASYMMETRIC = {"num_bits": 4, "type": "int", "symmetric": False}
SYMMETRIC = {"type": "int", "symmetric": True}
FORMATS = {
    "bitsandbytes_nf4": lambda: bitsandbytes_4bit("nf4", False, torch.float32),
    "bitsandbytes_nf4_nested": lambda: bitsandbytes_4bit("nf4", True, torch.bfloat16),
    "bitsandbytes_fp4": lambda: bitsandbytes_4bit("fp4", False, torch.float32),
    "bitsandbytes_int8": bitsandbytes_8bit,
    "gptq": lambda: gptq(4, "gptq", GROUP),
    "gptq_v2": lambda: gptq(4, "gptq_v2", -1),
    "gptq_desc_act": lambda: gptq(4, "gptq_v2", GROUP, desc_act=True),
    "gptq_8bit": lambda: gptq(8, "gptq", GROUP),
    "awq": awq,
    "pack_int4": lambda: compressed(
        "pack-quantized", strategy="group", group_size=GROUP, **ASYMMETRIC
    ),
    "pack_int4_symmetric": lambda: compressed(
        "pack-quantized", strategy="group", group_size=16, num_bits=4, **SYMMETRIC
    ),
    "pack_int8": lambda: compressed("pack-quantized", strategy="channel", num_bits=8, **SYMMETRIC),
    "int_quantized": lambda: compressed(
        "int-quantized", activations=True, strategy="channel", num_bits=8, **SYMMETRIC
    ),
    "float_quantized": lambda: compressed(
        "float-quantized", activations=True, strategy="tensor", num_bits=8, type="float"
    ),
    "float_blocks": lambda: compressed(
        "naive-quantized", strategy="block", block_structure=[16, 16], num_bits=8, type="float"
    ),
    "mxfp4_packed": lambda: compressed(
        "mxfp4-pack-quantized", strategy="group", group_size=32, num_bits=4, type="float",
        scale_dtype=torch.uint8,
    ),
    "nvfp4_packed": lambda: compressed(
        "nvfp4-pack-quantized", strategy="tensor_group", group_size=16, num_bits=4, type="float",
        scale_dtype=torch.float8_e4m3fn,
    ),
    "fp8": fp8,
}  # fmt: skip


def digest(values: torch.Tensor) -> str:
    """Return the SHA-256 of the bytes, without negative zeros."""
    values = (values + 0).contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()


def record(name: str, model: transformers.LlamaForCausalLM) -> tuple[dict, np.ndarray]:
    quantize, config, dtype = FORMATS[name]()
    tensors, digests, floats = {}, {}, {}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    linear.pop("lm_head")
    for key, module in linear.items():
        state, values = quantize(module)
        tensors |= {f"{key}.{x}": tensor.contiguous() for x, tensor in state.items()}
        digests[f"{key}.weight"] = digest(values)
        floats[f"{key}.weight"] = values.float()
    for key, tensor in model.state_dict().items():
        if key not in floats and key != "lm_head.weight":
            tensors[key] = tensor.to(dtype)
            floats[key] = tensors[key].float()
    directory = HERE / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    dtype = str(dtype).removeprefix("torch.")
    settings = {**model.config.to_dict(), "dtype": dtype, "quantization_config": config}
    (directory / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    dequantized = transformers.LlamaForCausalLM(model.config).eval()
    dequantized.load_state_dict(floats, strict=False)
    dequantized.tie_weights()
    with torch.no_grad():
        logits = dequantized(IDS).logits
    return {"dtype": dtype, "weights": digests}, logits.numpy()


def record_gpt_oss() -> dict:
    """Record two experts of gpt-oss, any codes and scales, with transformers' values of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    key = "model.layers.0.mlp.experts.gate_up_proj"
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8)
    values = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.float32)
    directory = HERE / "gpt_oss"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = {f"{key}_blocks": blocks, f"{key}_scales": scales}
    tensors[f"{key}_bias"] = torch.randn(2, 6).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    settings = {"model_type": "gpt_oss", "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    return {"dtype": "float32", "weights": {key: digest(values)}}


def main() -> None:
    open_sources(*sys.argv[1:3])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():  # a zero point of zero, which version 1 of GPTQ's files stores as -1
        model.model.layers[0].self_attn.q_proj.weight[3].abs_()
    expected, logits = {}, {"ids": IDS.numpy()}
    for name in FORMATS:
        expected[name], logits[name] = record(name, model)
        print(name)
    expected["gpt_oss"] = record_gpt_oss()
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(HERE / "logits.npz", **logits)


if __name__ == "__main__":
    main()
