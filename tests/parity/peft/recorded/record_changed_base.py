"""Record adapters of a changed base as peft 0.21.2 (torch 2.13) saves them unconverted.

    python -m tests.parity.peft.recorded.record_changed_base

writes `changed_base.npz`, adapters of record_files' model, whose base stays as it was in files.npz:

    <case>/adapter_model.safetensors      the two files, as bytes
    <case>/adapter_config.json
    <case>/y                              the outputs [2, 4] after PEFT loaded them on that base
    <case>/residual/<name>                the base's weights that the initialization changed
"""

import pathlib
import tempfile
import warnings
from typing import Any

import numpy as np
import peft
import torch

from tests.parity.peft.recorded import record_files

FILE = pathlib.Path(__file__).parent / "changed_base.npz"
LINEAR = ["up", "down"]
CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "target_modules": LINEAR},
    "pissa conv1d": {
        "init_lora_weights": "pissa",
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
    },
    "pissa dora": {"init_lora_weights": "pissa", "target_modules": LINEAR, "use_dora": True},
    "pissa patterns": {
        "init_lora_weights": "pissa",
        "target_modules": LINEAR,
        "rank_pattern": {"layers.1.up": 2, "down": 4},
        "alpha_pattern": {"down": 1.5},
        "use_rslora": True,
    },
    "pissa and an embedding": {
        "init_lora_weights": "pissa",
        "target_modules": ["emb", "up"],
        "modules_to_save": ["head"],
    },
    "olora": {"init_lora_weights": "olora", "target_modules": LINEAR},
    "olora rslora": {"init_lora_weights": "olora", "target_modules": LINEAR, "use_rslora": True},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4", "target_modules": LINEAR},
}


def record(fields: dict[str, Any], ids: torch.Tensor) -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 4, "lora_dropout": 0.1, **fields})
    adapted = peft.get_peft_model(record_files.build(), config)
    residual = {
        f"residual/{name.removeprefix('base_model.model.').replace('.base_layer', '')}": x.numpy()
        for name, x in adapted.state_dict().items()
        if name.endswith(".base_layer.weight") and ".odd." not in name
    }
    record_files.move(adapted)
    found = record_files.saved(adapted)
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(record_files.build(), folder).eval()
    with torch.no_grad():
        y = loaded(ids).numpy()
        if config.init_lora_weights == "pissa_niter_4":  # what was trained, on its own residual
            y = adapted.eval()(ids).numpy()
    return found | {"y": y} | residual


def main() -> None:
    warnings.simplefilter("ignore")
    ids = torch.from_numpy(np.load(record_files.FILE)["ids"])
    found: dict[str, np.ndarray] = {}
    for name, fields in CASES.items():
        found |= {f"{name}/{key}": x for key, x in record(fields, ids).items()}
    np.savez_compressed(FILE, **found)
    print(f"{FILE.name}: {len(CASES)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
