"""Record sequence classifiers of peft 0.21.2 and transformers on the models of tests/models.

    python -m tests.parity.peft.recorded.record_classifiers [bert | llama | qwen2 ...]

writes `classifiers.npz`: of each model the two files of an adapter with a head, as bytes; `ids` and
`mask`, padded on the right (of RoBERTa `roberta/ids`); `logits` of transformers' model with the
adapter; and `names`, the tensors that transformers writes for the merged model.
"""

import pathlib
import sys
import tempfile

import numpy as np
import peft
import torch
import transformers

from tests.parity.peft.recorded.record_files import move

FILE = pathlib.Path(__file__).parent / "classifiers.npz"
MODELS = pathlib.Path(__file__).parents[3] / "models" / "fixtures"
CASES = {
    "bert": {"target_modules": ["query", "value"]},
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "qwen2": {"target_modules": "all-linear"},  # its embedding is tied to the head that is not used
    "roberta": {"target_modules": ["query", "intermediate.dense"]},  # its head has two layers
    # of its head only the last layer trains, unless the others are named
    "modernbert": {"target_modules": ["Wqkv", "Wo"], "modules_to_save": ["head"]},
}
LABELS = ["bad", "fair", "good"]


def main() -> None:
    ids = torch.arange(1, 23).reshape(2, 11) * 7 % 63 + 1
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids = ids * mask  # 0 is the padding token
    saved = dict(np.load(FILE)) if FILE.exists() else {}
    saved |= {"ids": ids.numpy(), "mask": mask.numpy()}
    for name in sys.argv[1:] or CASES:
        fields = CASES[name]
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
        own = ids
        if model.config.pad_token_id == 1:  # by which RoBERTa counts positions
            own = torch.where(mask > 0, ids.clamp(min=2), 1)
            saved[f"{name}/ids"] = own.numpy()
        with torch.no_grad():
            logits = model(input_ids=own, attention_mask=mask).logits
        saved[f"{name}/logits"] = logits.numpy()
        merged = model.merge_and_unload()
        saved[f"{name}/names"] = np.array(sorted(merged.state_dict()))
    np.savez_compressed(FILE, **saved)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
