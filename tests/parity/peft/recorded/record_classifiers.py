"""Record sequence classifiers of peft 0.21.2 and transformers on the models of tests/models.

    python -m tests.parity.peft.recorded.record_classifiers

writes `classifiers.npz`: of each model the two files of an adapter with a head, as bytes; `ids` and
`mask`, padded on the right; `logits` of transformers' model with the adapter; and `names`, the
tensors that transformers writes for the merged model.
"""

import pathlib
import tempfile

import numpy as np
import peft
import torch
import transformers

from tests.parity.peft.recorded.record_files import move

FILE = pathlib.Path(__file__).parent / "classifiers.npz"
MODELS = pathlib.Path(__file__).parents[2] / "models" / "fixtures"
CASES = {
    "bert": {"target_modules": ["query", "value"]},
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "qwen2": {"target_modules": "all-linear"},  # its embedding is tied to the head that is not used
}
LABELS = ["bad", "fair", "good"]


def main() -> None:
    ids = torch.arange(1, 23).reshape(2, 11) * 7 % 63 + 1
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids = ids * mask  # 0 is the padding token
    saved = {"ids": ids.numpy(), "mask": mask.numpy()}
    for name, fields in CASES.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            MODELS / name, num_labels=3, dtype="float32", attn_implementation="eager"
        )
        config = peft.LoraConfig(r=3, lora_alpha=4, task_type="SEQ_CLS", **fields)
        model = move(peft.get_peft_model(model, config)).eval()
        with tempfile.TemporaryDirectory() as folder:
            model.peft_config["default"].base_model_name_or_path = name
            model.save_pretrained(folder)
            for file in ("adapter_model.safetensors", "adapter_config.json"):
                data = (pathlib.Path(folder) / file).read_bytes()
                saved[f"{name}/{file}"] = np.frombuffer(data, np.uint8)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits
        saved[f"{name}/logits"] = logits.numpy()
        merged = model.merge_and_unload()
        saved[f"{name}/names"] = np.array(sorted(merged.state_dict()))
    np.savez_compressed(FILE, **saved)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
