"""Record adapters of peft 0.21.2 on the models of tests/models/fixtures: see test_models.py.

    python -m tests.parity.peft.recorded.record_models

writes `models.npz`: of each of the models below the two files of an adapter, as bytes, and `ids`
and `y`, the outputs of transformers' model with it.
"""

import pathlib
import tempfile
import warnings

import numpy as np
import peft
import torch
import transformers

from tests.parity.peft.recorded.record_files import move

FILE = pathlib.Path(__file__).parent / "models.npz"
MODELS = pathlib.Path(__file__).parents[3] / "models" / "fixtures"
CASES = {
    "llama": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "use_rslora": True,
    },
    "llama_tied": {"target_modules": ["v_proj", "embed_tokens"], "ensure_weight_tying": True},
    "gemma3_text": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "phi3": {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True},
    "qwen2": {"target_modules": ["gate_proj"], "use_dora": True, "bias": "lora_only"},
}


def main(cases: dict = CASES, path: pathlib.Path = FILE) -> None:
    warnings.simplefilter("error")
    for harmless in (".*is_gradient_checkpointing", ".*save_embedding_layers"):
        warnings.filterwarnings("ignore", harmless)
    ids, saved = torch.arange(1, 10).reshape(1, 9) * 7 % 64, {}
    for name, fields in cases.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            MODELS / name, experts_implementation="eager"
        )
        torch.manual_seed(0)
        config = peft.LoraConfig(r=3, lora_alpha=4, task_type="CAUSAL_LM", **fields)
        model = move(peft.get_peft_model(model.float(), config)).eval()
        with torch.no_grad():
            saved |= {f"{name}/ids": ids.numpy(), f"{name}/y": model(ids).logits.numpy()}
        with tempfile.TemporaryDirectory() as folder:
            # without the copies of weights that are in the model's own file
            model.save_pretrained(folder, save_embedding_layers=False)
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                data = (pathlib.Path(folder) / file).read_bytes()
                saved[f"{name}/{file}"] = np.frombuffer(data, np.uint8)
    np.savez_compressed(path, **saved)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
