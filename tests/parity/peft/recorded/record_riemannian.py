"""Record peft 0.21.2's Riemannian optimizer on torch: the oracle of test_riemannian.py.

    python -m tests.parity.peft.recorded.record_riemannian

writes `riemannian.npz`: a model of two linear layers, tanh between them, fits random targets for
five steps with SGD and with AdamW, each at two dampings. The keys are

    x, target                        input [8, 7] and target [8, 5]
    up/w, up/bias, down/w, ...       the base, never trained
    up/a, up/b, down/a, down/b       the factors at the start; B is not zero
    scale                            alpha/r, of both layers
    <run>/loss                       [6]: before each step and after the last
    <run>/up/a, ...                  the factors after five steps

with runs `sgd_0.01`, `sgd_1`, `adamw_0.01` and `adamw_1`, in this project's orientation.
"""

import copy
import pathlib

import numpy as np
import peft
import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn

FILE = pathlib.Path(__file__).parent / "riemannian.npz"
RANK, ALPHA, STEPS = 3, 6.0, 5
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 0.02, "weight_decay": 0.1}),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def factors(model: nn.Module) -> dict[str, np.ndarray]:
    """Return A `[in, rank]` and B `[rank, out]` by name."""
    return {
        f"{layer}/{field}": getattr(getattr(model.base_model.model, layer), f"lora_{field.upper()}")
        .default.weight.detach()
        .T.clone()
        .numpy()
        for layer in ("up", "down")
        for field in ("a", "b")
    }


def main() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["up", "down"])
    start = peft.get_peft_model(Model(), config)
    for name, parameter in start.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    x, target = torch.randn(8, 7), torch.randn(8, 5)
    numbers = {"x": x.numpy(), "target": target.numpy(), "scale": np.float32(ALPHA / RANK)}
    for layer in ("up", "down"):
        base = getattr(start.base_model.model, layer).base_layer
        numbers[f"{layer}/w"] = base.weight.detach().T.numpy()
        numbers[f"{layer}/bias"] = base.bias.detach().numpy()
    numbers |= factors(start)
    for name, (optimizer, options) in OPTIMIZERS.items():
        for damping in (0.01, 1.0):
            model = copy.deepcopy(start)
            made = create_riemannian_optimizer(model, optimizer, reg=damping, **options)
            losses = []
            for step in range(STEPS + 1):
                made.zero_grad()
                loss = ((model(x) - target) ** 2).mean()
                losses.append(loss.item())
                if step < STEPS:
                    loss.backward()
                    made.step()
            run = f"{name}_{damping:g}"
            numbers[f"{run}/loss"] = np.array(losses, np.float32)
            numbers |= {f"{run}/{path}": value for path, value in factors(model).items()}
    np.savez_compressed(FILE, **numbers)
    FILE.chmod(0o644)
    print(f"{FILE.name}: {len(numbers)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
