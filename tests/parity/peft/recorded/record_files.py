"""Record adapter files that peft 0.21.2 (torch 2.13) saves: the oracle of test_files.py.

    python -m tests.parity.peft.recorded.record_files

writes `files.npz`, a model with layers of every kind and adapters of every kind on it:

    base/<name>                           its tensors, under torch's names
    ids, y                                token numbers [2, 5], and its outputs [2, 4] on them
    <case>/adapter_model.safetensors      the two files of each adapter, as bytes
    <case>/adapter_config.json
    <case>/y                              the adapted outputs [2, 4]
"""

import pathlib
import tempfile
import warnings
from typing import Any

import numpy as np
import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

FILE = pathlib.Path(__file__).parent / "files.npz"
VOCABULARY, WIDTH, HIDDEN, LAYERS = 17, 6, 10, 3
LINEAR = ["up", "down"]
CASES: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": LINEAR},
    "one module": {"target_modules": ["model.layers.1.up"]},
    "regex": {"target_modules": r".*layers\.[02]\.(up|down)"},
    "all-linear": {"target_modules": "all-linear", "exclude_modules": ["head", "c_attn"]},
    "some layers": {"target_modules": LINEAR, "layers_to_transform": [0, 2]},
    "patterns": {
        "target_modules": [*LINEAR, "c_attn"],
        "rank_pattern": {"layers.1.up": 2, "^model.layers.2.down": 5, "c_attn": 4},
        "alpha_pattern": {"down": 1.5, r"layers\.[01]\.up": 9},
        "fan_in_fan_out": True,
    },
    "rslora": {"target_modules": LINEAR, "use_rslora": True, "rank_pattern": {"up": 2}},
    "conv1d": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "embedding": {"target_modules": ["emb"]},
    "convolutions": {"target_modules": ["conv1", "conv2"]},
    "dora": {"target_modules": [*LINEAR, "emb", "conv1", "conv2"], "use_dora": True},
    "dora conv1d": {"target_modules": ["c_attn"], "use_dora": True, "fan_in_fan_out": True},
    "bias all": {"target_modules": ["up"], "bias": "all"},
    "bias lora_only": {"target_modules": ["up", "conv1"], "bias": "lora_only"},
    "lora_bias": {"target_modules": ["up"], "lora_bias": True},
    "modules_to_save": {"target_modules": ["up"], "modules_to_save": ["head", "norm"]},
    "tokens": {"target_modules": ["down"], "trainable_token_indices": {"emb": [9, 2, 13]}},
    "odd names": {"target_modules": ["odd.lora_A", "odd.weight", "odd.base_layer"]},
    "odd names whole": {"target_modules": ["up"], "modules_to_save": ["odd.lora_A"]},
    "odd names with bias": {"target_modules": ["odd.base_layer"], "bias": "lora_only"},
    "bfloat16": {"target_modules": LINEAR},
}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.c_attn = Conv1D(3 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.c_attn(self.norm(x)).split(WIDTH, -1)
        x = x + query * torch.sigmoid(key) + value
        return x + self.down(torch.tanh(self.up(x)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.conv1 = nn.Conv1d(WIDTH, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 3, (3, 2))
        names = {"lora_A": (6, 5), "weight": (5, 4), "base_layer": (4, 4)}
        self.odd = nn.ModuleDict({name: nn.Linear(*sizes) for name, sizes in names.items()})

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.conv1(x.transpose(1, 2))  # [batch, 4, length]
        x = self.conv2(x.reshape(len(ids), 2, 2, -1).transpose(2, 3))  # [batch, 3, 3, 1]
        x = torch.tanh(x.mean(3).mean(2).repeat(1, 2))  # [batch, 6]
        for name in ("lora_A", "weight", "base_layer"):
            x = torch.tanh(self.odd[name](x))
        return x


class Model(nn.Module):
    """Holds the layers as `model`, as causal language models do; PEFT's names show it."""

    def __init__(self):
        super().__init__()
        self.model = Body()
        self.head = nn.Linear(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.model(ids))


def build() -> nn.Module:
    torch.manual_seed(0)
    return move(Model())


def move(model: nn.Module) -> nn.Module:
    """Move all trained parameters, so that factors are nonzero and biases differ from the base."""
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.3 * torch.randn(x.shape))
    return model


def record(name: str, fields: dict[str, Any], ids: torch.Tensor) -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 4, "lora_dropout": 0.1, **fields})
    model = move(peft.get_peft_model(build(), config)).eval()
    if name == "bfloat16":  # the outputs in float32, of factors that bfloat16 holds
        for x in model.parameters():
            x.data = x.bfloat16().float() if x.requires_grad else x
    with torch.no_grad():
        y = model(ids)
    if name == "bfloat16":
        model.bfloat16()
    return {f"{name}/{key}": x for key, x in (saved(model) | {"y": y.numpy()}).items()}


def saved(model: Any) -> dict[str, np.ndarray]:
    """Return the bytes of the files that peft writes for a model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {
            file: np.frombuffer((pathlib.Path(folder) / file).read_bytes(), np.uint8)
            for file in ("adapter_model.safetensors", "adapter_config.json")
        }


def main() -> None:
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "fan_in_fan_out is set to")  # PEFT sets it right by itself
    warnings.filterwarnings("ignore", ".*have invalid shape")  # of the bias of odd.lora_A
    model = build()
    torch.manual_seed(2)
    ids = torch.randint(VOCABULARY, (2, 5))
    ids[0, :3] = torch.tensor([9, 2, 13])
    with torch.no_grad():
        saved = {"ids": ids.numpy(), "y": model(ids).numpy()}
    saved |= {f"base/{name}": x.numpy() for name, x in model.state_dict().items()}
    for name, fields in CASES.items():
        saved |= record(name, fields, ids)
    np.savez_compressed(FILE, **saved)
    print(f"{FILE.name}: {len(CASES)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
