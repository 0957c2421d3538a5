"""Load experts' parameters that lora_jax writes with real peft: outputs, names, no warnings.

    python -m tests.parity.peft.check_experts

needs torch, transformers and peft 0.21.2. Adapters of peft's own and of lora_jax's `init`, folded
or not, with the base or without; and adapters that peft makes of transformers' Mixtral, Qwen3-MoE
and GPT-OSS, read and written again.
"""

import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import peft as hugging_face
import torch
import transformers

import lora_jax
from lora_jax import peft
from lora_jax.core.tree import adapted_nodes
from lora_jax.files.naming import Entry, Naming
from tests.parity.peft import experts_model, models
from tests.parity.peft.check_files import loaded, moved
from tests.parity.peft.recorded import record_experts
from tests.parity.peft.recorded.record_files import move

TOLERANCE = 1e-5
CONFIGS = {
    "all": lora_jax.LoraConfig(rank=2, alpha=3, targets=["up", "down", "gate", "q"], dropout=0.1),
    "rslora": lora_jax.LoraConfig(rank=3, targets=["up"], scaling="rslora"),
    "one part": lora_jax.LoraConfig(rank=2, targets=["other/up", "other/down"]),
    "one layer": lora_jax.LoraConfig(rank=2, targets=["layers/down", "q"], layers=[1]),
    "ranks": lora_jax.LoraConfig(
        rank=2, targets=["layers/up", "q"], overrides={"up": {"rank": 3, "alpha": 7}}
    ),
}

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
#: Models of transformers, and the kind of their experts' parameters.
MODELS = {
    "Mixtral": (transformers.MixtralConfig(**SIZES, num_local_experts=4), "experts"),
    "Qwen3-MoE": (
        transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24),
        "experts",
    ),
    "GPT-OSS": (
        transformers.GptOssConfig(
            **SIZES, num_local_experts=4, layer_types=["full_attention"] * 2, rope_parameters=None
        ),
        "experts_transposed",
    ),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = ((BOTH, ["q_proj"]), (BOTH[1:], []))


def adapters() -> Iterator[tuple[str, Any, Any]]:
    """Yield names, overlays, and their configurations."""
    base = experts_model.base()
    for case in experts_model.CASES:
        folder = experts_model.unpack(case, pathlib.Path(tempfile.mkdtemp()))
        yield case, peft.load(folder, base, experts_model.NAMING), peft.read_config(folder)
    for name, config in CONFIGS.items():
        x = experts_model.RECORDED["x"]
        params = lora_jax.init(jax.random.key(0), base, config, experts_model.apply, x)
        yield f"lora_jax {name}", moved(lora_jax.split(params)[1]), config


def difference(overlay: Any, **options: Any) -> float:
    """Return the largest difference between the outputs of PyTorch with peft and of JAX."""
    base, x = experts_model.base(), experts_model.RECORDED["x"]
    tree = {path: np.asarray(leaf) for path, leaf in base.items()}
    for path, node in adapted_nodes(overlay).items():
        tree[path] = models.meaning(node, tree[path])
    want = np.asarray(experts_model.apply(tree, x))
    with tempfile.TemporaryDirectory() as folder:
        peft.save(folder, overlay, experts_model.NAMING, **options)
        model = loaded(record_experts.build(), folder)
        with torch.no_grad():
            got = model(torch.from_numpy(x)).numpy()
    return float(np.abs(got - want).max() / np.abs(want).max())


def transformers_model(name: str) -> torch.nn.Module:
    """Return one of `MODELS` with random parameters."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name][0])
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.05 * torch.randn(x.shape))
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 17, 5, 9, 11, 63, 1]])).logits


def round_trip(name: str, parameters: list[str], targets: list[str]) -> float:
    """Return how far a model with a file that was read and written again is from peft's."""
    fields = {"target_parameters": parameters, "target_modules": targets}
    config = hugging_face.LoraConfig(r=2, lora_alpha=3, **fields)
    model = move(hugging_face.get_peft_model(transformers_model(name), config)).eval()
    weights = {
        key: x.detach().numpy()
        for key, x in transformers_model(name).named_parameters()
        if "q_proj.weight" in key or any(key.endswith(end) for end in BOTH)
    }
    rows = [
        Entry(key, key, MODELS[name][1], "e x y -> e x y")
        if x.ndim == 3
        else Entry(key, key, "linear", "o i -> o i")
        for key, x in weights.items()
    ]
    with tempfile.TemporaryDirectory() as there, tempfile.TemporaryDirectory() as again:
        model.save_pretrained(there)
        overlay = peft.load(there, weights, Naming(tuple(rows)))
        peft.save(again, overlay, Naming(tuple(rows)), base=weights)
        got, want = logits(loaded(transformers_model(name), again)), logits(model)
    assert (want - logits(transformers_model(name))).abs().max() > 0.1, name
    return float((got - want).abs().max())


def main() -> None:
    warnings.simplefilter("error")
    # PEFT says so of patterns for parameters, and applies them
    warnings.filterwarnings("ignore", ".*_pattern keys did not match any targeted module")
    for harmless in (".*is_gradient_checkpointing", ".*save_embedding_layers"):
        warnings.filterwarnings("ignore", harmless)
    worst, count, base = 0.0, 0, experts_model.base()
    for name, overlay, config in adapters():
        for options in ({"base": base, "config": config}, {"base": base, "fold": True}, {}):
            count += 1
            apart = difference(overlay, **options)
            print(f"{apart:.1e}  {name}, {', '.join(options) or 'adapters alone'}", flush=True)
            worst = max(worst, apart)
            assert apart < TOLERANCE, name
    for name in MODELS:
        for parameters, targets in TARGETS:
            count += 1
            apart = round_trip(name, parameters, targets)
            print(f"{apart:.1e}  {name}, {', '.join(parameters + targets)}", flush=True)
            worst = max(worst, apart)
            assert apart < TOLERANCE, name
    print(f"{count} adapters of experts load in peft; outputs differ by {worst:.1e} at most")


if __name__ == "__main__":
    main()
