"""Record how peft 0.21.2 starts EVA and LoRA-GA: the oracle of test_eva.py and test_lora_ga.py.

    python -m tests.parity.peft.recorded.record_from_data

writes `from_data.safetensors`. A perceptron of two layers on torch, `gelu(x·up + bias)·down`, and
one batch. The arrays are in this project's orientation, W `[in, out]`, A `[in, rank]`, B
`[rank, out]`:

    x, target                     the batch; the loss is mean((y - target)²)
    up.w, up.bias, down.w         the model
    eva/<layer>.a, .scale         EVA with rank 3 of each, ρ = 2 and α = 6: ranks are PEFT's own
    lora_ga/<layer>.a, .b, .w     LoRA-GA ("stable", γ = 16), rank 2 and α = 4; w is the new base
    lora_ga/<layer>.gradient      of the loss
    lora_ga/y                     the output at the start
"""

import pathlib

import numpy as np
import peft
import torch
from safetensors.numpy import save_file
from torch import nn

FILE = pathlib.Path(__file__).parent / "from_data.safetensors"
LAYERS = ("up", "down")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 10)
        self.down = nn.Linear(10, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


def build() -> tuple[Model, torch.Tensor, torch.Tensor]:
    """The model, inputs that vary alike in all directions, and targets.

    What `down` meets varies less and less from unit to unit, so that ranks move there.
    """
    torch.manual_seed(0)
    model = Model()
    model.up.weight.data *= 0.95 ** torch.arange(10)[:, None]
    return model, torch.randn(256, 12) + 0.5, torch.randn(256, 8)


def array(x: torch.Tensor) -> np.ndarray:
    return x.detach().clone().numpy()


def eva() -> dict[str, np.ndarray]:
    """Return the factors and scales that PEFT's EVA gives the model."""
    model, x, _ = build()
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=list(LAYERS),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99999),
    )
    model = peft.get_peft_model(model, config)
    peft.initialize_lora_eva_weights(
        model,
        [x],
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    numbers = {}
    for name in LAYERS:
        layer = getattr(model.base_model.model, name)
        numbers[f"{name}.a"] = array(layer.lora_A["default"].weight).T
        numbers[f"{name}.scale"] = np.array(layer.scaling["default"], np.float32)
    return numbers


def lora_ga() -> dict[str, np.ndarray]:
    """Return the factors and bases of PEFT's LoRA-GA, and the gradients it reads."""
    model, x, target = build()
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=list(LAYERS),
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )

    def step() -> None:
        ((model(x) - target) ** 2).mean().backward()

    peft.preprocess_loraga(model, config, step)
    numbers = {
        f"{name}.gradient": array(getattr(model, name)._peft_loraga_grad).T for name in LAYERS
    }
    model = peft.get_peft_model(model, config)
    for name in LAYERS:
        layer = getattr(model.base_model.model, name)
        numbers[f"{name}.a"] = array(layer.lora_A["default"].weight).T
        numbers[f"{name}.b"] = array(layer.lora_B["default"].weight).T
        numbers[f"{name}.w"] = array(layer.base_layer.weight).T
    return numbers | {"y": array(model(x))}


def main() -> None:
    model, x, target = build()
    numbers = {"x": array(x), "target": array(target), "up.bias": array(model.up.bias)}
    numbers |= {f"{name}.w": array(getattr(model, name).weight).T for name in LAYERS}
    numbers |= {f"eva/{name}": value for name, value in eva().items()}
    numbers |= {f"lora_ga/{name}": value for name, value in lora_ga().items()}
    save_file({name: np.ascontiguousarray(x) for name, x in numbers.items()}, FILE)
    FILE.chmod(0o644)  # safetensors writes for the owner alone
    for name, value in numbers.items():
        print(name, np.shape(value))


if __name__ == "__main__":
    main()
