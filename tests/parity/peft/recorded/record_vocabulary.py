"""Record adapters of peft 0.21.2 on models whose vocabulary was resized: see test_vocabulary.py.

    python -m tests.parity.peft.recorded.record_vocabulary

writes `vocabulary.npz`: of each case the two files of an adapter, as bytes, and the logits of
transformers' model with it for `ids`, which contain new tokens.
"""

import pathlib
import tempfile

import numpy as np
import peft
import torch
import transformers

from tests.parity.peft.recorded.record_files import move

FILE = pathlib.Path(__file__).parent / "vocabulary.npz"
MODELS = pathlib.Path(__file__).parents[3] / "models" / "fixtures"
TOKENS = 70  # instead of 64
#: Name of a case: the model (qwen2's head is tied to its embedding) and the configuration.
CASES = {
    "frozen": ("llama", {}),
    "frozen tied": ("qwen2", {}),
    "trained": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "trained tied": (
        "qwen2",
        {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "trained apart": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head alone": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "embedding alone": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "factors": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "rows": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 64, 69]}}),
    "smaller": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


def main() -> None:
    ids = torch.arange(1, 10).reshape(1, 9) * 7 % 60
    saved = {"small ids": ids.clone().numpy()}
    ids[0, 3], ids[0, 6] = 65, 69
    saved["ids"] = ids.numpy()
    for case, (name, fields) in CASES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            MODELS / name, dtype="float32", attn_implementation="eager"
        )
        model.resize_token_embeddings(60 if case == "smaller" else TOKENS)
        fields = {"target_modules": ["q_proj"], **fields}
        config = peft.LoraConfig(r=3, lora_alpha=4, task_type="CAUSAL_LM", **fields)
        model = move(peft.get_peft_model(model, config)).eval()
        given = saved["small ids" if case == "smaller" else "ids"]
        with torch.no_grad():
            saved[f"{case}/logits"] = model(torch.tensor(given)).logits.numpy()
        model.peft_config["default"].base_model_name_or_path = name
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_embedding_layers=True)
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                data = (pathlib.Path(folder) / file).read_bytes()
                saved[f"{case}/{file}"] = np.frombuffer(data, np.uint8)
    np.savez_compressed(FILE, **saved)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
