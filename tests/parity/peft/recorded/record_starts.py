"""Record what adapters of peft 0.21.2 (torch 2.13) start with: the oracle of test_starts.py.

    python -m tests.parity.peft.recorded.record_starts

writes `starts.safetensors`:

    w                           a weight [out, in] with singular values that fall
    <start>/{a,b,base,scale}    pissa, olora, with and without rsLoRA, of that weight, at rank 4 and
                                alpha 6: A [r, in], B [out, r] and what the base becomes
    <start>/<layer>/{a,b}       kaiming, gaussian, orthogonal: 1000 entries of each factor (one,
                                where all are the same) of a layer at rank 16
"""

import pathlib
from typing import Any

import numpy as np
import peft
import torch
from safetensors.numpy import save_file
from torch import nn

FILE = pathlib.Path(__file__).parent / "starts.safetensors"
RANK, ALPHA = 4, 6
SAMPLES = 1000


class Model(nn.Module):
    """One layer under the name "layer"."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


def adapted(layer: nn.Module, init: Any, **fields: Any) -> Any:
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["layer"], **fields}
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(layer), peft.LoraConfig(init_lora_weights=init, **config))
    return model.base_model.model.layer


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().copy()


def decompositions(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Return W [out, in] with decreasing singular values, and its PiSSA and OLoRA factors."""
    found = {"w": weight}
    for name in ("pissa", "olora"):
        for rs in (False, True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = torch.tensor(weight)
            layer = adapted(linear, name, use_rslora=rs)
            prefix = f"{name} with rslora" if rs else name
            found[f"{prefix}/a"] = array(layer.lora_A["default"].weight)
            found[f"{prefix}/b"] = array(layer.lora_B["default"].weight)
            found[f"{prefix}/base"] = array(layer.base_layer.weight)
            found[f"{prefix}/scale"] = np.array(layer.scaling["default"])
    return found


def some(x: torch.Tensor) -> np.ndarray:
    """Return a sample of the entries, or one entry if all are equal."""
    flat = array(x).ravel()
    return flat[:1] if (flat == flat[0]).all() else flat[:: len(flat) // SAMPLES][:SAMPLES]


def distributions() -> dict[str, np.ndarray]:
    layers = {
        "linear": lambda: nn.Linear(400, 300),
        "conv": lambda: nn.Conv2d(16, 64, 3),
        "embedding": lambda: nn.Embedding(400, 300),
    }
    found = {}
    for init, kind in [
        *[(init, kind) for init in (True, "gaussian") for kind in layers],
        ("orthogonal", "linear"),
    ]:
        layer = adapted(layers[kind](), init, r=16)
        a, b = (
            (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
            if kind == "embedding"
            else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        )
        name = f"{'kaiming' if init is True else init}/{kind}"
        found |= {f"{name}/a": some(a), f"{name}/b": some(b)}
    return found


if __name__ == "__main__":
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(20, 12)) * np.linspace(0.1, 1, 12)
    arrays = {**decompositions(weight.astype(np.float32)), **distributions()}
    save_file(arrays, FILE, {"peft": peft.__version__, "torch": torch.__version__})
    print(f"{FILE.name}: {len(arrays)} arrays, {FILE.stat().st_size:,} bytes")
