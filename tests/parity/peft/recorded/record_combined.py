"""Record what add_weighted_adapter of peft 0.21.2 (torch 2.13) combines adapters to.

    python -m tests.parity.peft.recorded.record_combined

writes `combined.npz`, adapters of record_files' model, whose base stays as it was in files.npz:

    adapters/<name>/adapter_model.safetensors   the two files of each adapter, as bytes
    adapters/<name>/adapter_config.json
    cases/<case>/adapter_model.safetensors      those of the combined one; see CASES
    cases/<case>/adapter_config.json
    masks/<case>                                the masks that DARE drew, safetensors as bytes:
                                                uint8 "<module>/<number>" in the order of the draws
    intruders/adapter_model.safetensors         "linear" after reduce_intruder_dimension
    intruders/adapter_config.json
    intruders/counts                            how many there were, in the order of the modules
"""

import pathlib
import tempfile
import warnings
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.lora import intruders
from safetensors.torch import save

from tests.parity.peft.recorded import record_files

FILE = pathlib.Path(__file__).parent / "combined.npz"
ALL = ["up", "down", "c_attn", "emb", "conv2"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"lora_alpha": 4, "target_modules": ALL},
    "rslora": {"lora_alpha": 2, "target_modules": ["up", "emb", "conv2"], "use_rslora": True},
    "patterns": {
        "target_modules": ["up", "c_attn", "conv2"],
        "alpha_pattern": {"up": 9},
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "small": {"r": 2, "target_modules": ["up", "emb", "down"], "rank_pattern": {"down": 1}},
    "linear": {"r": 3, "lora_alpha": 12, "target_modules": ["up", "down"]},
}
EQUAL = {"adapters": ["all", "rslora", "patterns"], "weights": [0.7, -1.2, 0.4]}
MIXED = {"adapters": ["all", "small"], "weights": [-0.5, 1.5]}
DENSITY = {"density": 0.55}
FREQUENT = {"majority_sign_method": "frequency"}
CASES: dict[str, dict[str, Any]] = {
    "cat": EQUAL,
    "cat mixed": MIXED,
    "linear": EQUAL,
    "svd": EQUAL,
    "svd mixed": MIXED,
    "svd of rank 2": EQUAL | {"svd_rank": 2},
    "ties": EQUAL | DENSITY,
    "ties frequency": EQUAL | DENSITY | FREQUENT,
    "ties_svd": EQUAL | DENSITY,
    "ties_svd frequency": EQUAL | DENSITY | FREQUENT,
    "magnitude_prune": EQUAL | DENSITY,
    "magnitude_prune_svd": EQUAL | DENSITY,
    "magnitude_prune_svd mixed": MIXED | {"density": 0.2},
    "dare_linear": EQUAL | DENSITY,
    "dare_linear_svd": EQUAL | DENSITY,
    "dare_ties": EQUAL | DENSITY,
    "dare_ties_svd": EQUAL | DENSITY,
}
INTRUDERS = {"top_k": 4, "threshold_epsilon": 0.8, "mitigation_lambda": 0.3}


def build(*names: str) -> Any:
    """Return the model with some of the adapters, their factors nonzero."""
    model: Any = record_files.build()
    for seed, (name, fields) in enumerate(ADAPTERS.items()):
        if name not in names:
            continue
        torch.manual_seed(seed)
        config = peft.LoraConfig(**{"r": 3, "lora_dropout": 0.0, **fields})
        if name == names[0]:
            model = peft.get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
        with torch.no_grad():
            for key, x in model.named_parameters():
                if f".{name}" in key and "lora_" in key:
                    x.copy_(0.5 * torch.randn(x.shape))
    return model


def saved(model: Any, name: str) -> dict[str, np.ndarray]:
    """Return the bytes of the files that peft writes for one adapter."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[name])
        place = pathlib.Path(folder) / name
        return {
            file: np.frombuffer((place / file).read_bytes(), np.uint8)
            for file in ("adapter_model.safetensors", "adapter_config.json")
        }


class Masks:
    """Records what torch.bernoulli draws, by the module that is being combined."""

    def __init__(self, model: Any):
        self.drawn: dict[str, torch.Tensor] = {}
        self.names = {id(module): name for name, module in model.base_model.model.named_modules()}
        self.target, self.bernoulli = "", torch.bernoulli
        for method in (
            "_generalized_task_arithmetic_weighted_adapter",
            "_svd_generalized_task_arithmetic_weighted_adapter",
        ):
            self.wrap(model.base_model, method)

    def wrap(self, tuner: Any, method: str) -> None:
        inner = getattr(tuner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            (target,) = (x for x in args if isinstance(x, peft.tuners.lora.LoraLayer))
            self.target = self.names[id(target)]
            return inner(*args, **kwargs)

        setattr(tuner, method, wrapped)

    def draw(self, input: torch.Tensor) -> torch.Tensor:
        mask = self.bernoulli(input)
        number = sum(name.startswith(f"{self.target}/") for name in self.drawn)
        self.drawn[f"{self.target}/{number}"] = mask.to(torch.uint8)
        return mask


def combine(case: str, options: dict[str, Any]) -> tuple[dict[str, np.ndarray], Masks]:
    model = build(*ADAPTERS)
    masks = Masks(model)
    torch.manual_seed(8)
    torch.bernoulli = masks.draw
    try:
        model.add_weighted_adapter(
            adapter_name="combined", combination_type=case.split()[0], **options
        )
    finally:
        torch.bernoulli = masks.bernoulli
    return saved(model, "combined"), masks


def reduce_intruders() -> dict[str, np.ndarray]:
    model, lines = build("linear"), []
    intruders.reduce_intruder_dimension(
        model, "linear", "intruders", logging_sink=lines.append, **INTRUDERS
    )
    *ends, _ = [line.rpartition(": ")[2] for line in lines]
    counts = [0 if end.startswith("No") else int(end) for end in ends]
    return saved(model, "intruders") | {"counts": np.array(counts)}


def main() -> None:
    warnings.simplefilter("ignore")
    model = build(*ADAPTERS)
    found: dict[str, np.ndarray] = {}
    for name in ADAPTERS:
        found |= {f"adapters/{name}/{key}": x for key, x in saved(model, name).items()}
    for case, options in CASES.items():
        files, masks = combine(case, options)
        found |= {f"cases/{case}/{key}": x for key, x in files.items()}
        if masks.drawn:
            found[f"masks/{case}"] = np.frombuffer(save(masks.drawn), np.uint8)
    found |= {f"intruders/{key}": x for key, x in reduce_intruders().items()}
    np.savez_compressed(FILE, **found)
    print(f"{FILE.name}: {len(CASES)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
