"""Record adapters that peft 0.21.2 (torch 2.13) makes of experts' parameters: of test_experts.py.

    python -m tests.parity.peft.recorded.record_experts

writes `experts.npz`:

    base/<name>                           the model's tensors, under torch's names
    x, y                                  inputs [5, 4], and its outputs [5, 4] on them
    <case>/adapter_model.safetensors      the two files of each adapter, as bytes
    <case>/adapter_config.json
    <case>/y                              the adapted outputs [5, 4]
"""

import pathlib
import warnings
from typing import Any

import numpy as np
import peft
import torch
from torch import nn

from tests.parity.peft.recorded.record_files import move, saved

FILE = pathlib.Path(__file__).parent / "experts.npz"
EXPERTS, WIDTH, HIDDEN, LAYERS = 3, 4, 5, 2
CASES: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": ["experts.up_proj", "experts.down_proj"]},
    "one layer": {"target_parameters": ["layers.1.experts.down_proj"], "target_modules": ["q"]},
    "transposed": {"target_parameters": ["other.down", "other.gate_up"], "use_rslora": True},
    "first axis in": {"target_parameters": ["last.up"]},
    "patterns": {
        "target_parameters": ["up_proj", "down_proj", "other.gate_up", "last.up"],
        "target_modules": ["q"],
        "rank_pattern": {"layers.0.experts.up_proj": 3, "layers.1.q": 1},
        "alpha_pattern": {r"layers\.\d\.experts\.down_proj": 5},
    },
}


class Experts(nn.Module):
    """All experts on every row, `[experts, out, in]`; here "up" comes before "down"."""

    def __init__(self):
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(torch.einsum("ni,eoi->neo", x, self.up_proj))
        return torch.einsum("nei,eoi,ne->no", hidden, self.down_proj, share)


class Transposed(nn.Module):
    """`[experts, in, out]`, declared by the module, as in GPT-OSS."""

    is_transposed = True

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * HIDDEN))
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("ni,eio->neo", x, self.gate_up).chunk(2, -1)
        return torch.einsum("nei,eio,ne->no", torch.tanh(gate) * up, self.down, share)


class Unsaid(nn.Module):
    """`[experts, in, out]`, not declared by the module, as in Llama 4."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN))

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ni,eio,ne->no", x, self.up, share)[:, :WIDTH]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.experts = nn.Linear(WIDTH, WIDTH, bias=False), Experts()

    def forward(self, x: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        x = x + self.q(x)
        return x + self.experts(x, share)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.other, self.last = Transposed(), Unsaid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = torch.softmax(self.router(x), -1)
        for layer in self.layers:
            x = layer(x, share)
        x = x + self.other(x, share)
        return x + self.last(x, share)


def build() -> nn.Module:
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for x in model.parameters():
            x.mul_(0.5)
    return model


def record(name: str, fields: dict[str, Any], x: torch.Tensor) -> dict[str, np.ndarray]:
    torch.manual_seed(1)
    given = {"r": 2, "lora_alpha": 3, "target_modules": [], **fields}
    model = move(peft.get_peft_model(build(), peft.LoraConfig(**given))).eval()
    with torch.no_grad():
        y = model(x)
    return {f"{name}/{key}": x for key, x in (saved(model) | {"y": y.numpy()}).items()}


def main() -> None:
    warnings.simplefilter("error")
    # PEFT says so of patterns for parameters, and applies them
    warnings.filterwarnings("ignore", ".*_pattern keys did not match any targeted module")
    model = build()
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        saved = {"x": x.numpy(), "y": model(x).numpy()}
    saved |= {f"base/{name}": x.numpy() for name, x in model.state_dict().items()}
    for name, fields in CASES.items():
        saved |= record(name, fields, x)
    np.savez_compressed(FILE, **saved)
    print(f"{FILE.name}: {len(CASES)} cases, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
