"""Record what PEFT trains of a small model, and where one step takes it: selection.npz.

python -m tests.parity.peft.recorded.record_selection   (needs torch and peft 0.21.2)
"""

from pathlib import Path

import numpy as np
import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

VOCABULARY, WIDTH, HIDDEN, LAYERS, RANK, LR = 11, 4, 6, 3, 2, 0.5
ROWS, CHOSEN, RATIO = [9, 2], [0, 2], 4.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Model(nn.Module):
    """PEFT finds the number of a layer only after two or more names."""

    def __init__(self):
        super().__init__()
        self.model = Body()

    def forward(self, ids):
        return self.model(ids)


def adapted(base: dict, factors: dict | None, **fields) -> nn.Module:
    """Return the base with adapters; B is random, so that A has a gradient."""
    model = Model()
    model.load_state_dict(base)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=["up", "down"], layers_to_transform=CHOSEN, **fields
    )
    model = peft.get_peft_model(model, config).double()
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.copy_(factors[name] if factors else torch.randn(x.shape))
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    loss = ((model(ids) - 1) ** 2).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    base = Model().state_dict()
    ids = torch.randint(VOCABULARY, (3, 5))
    saved = {f"base.{name}": x.numpy() for name, x in base.items()} | {"ids": ids.numpy()}

    model = adapted(base, None, bias="lora_only", trainable_token_indices={"embed": ROWS})
    start = {n: x.detach().clone() for n, x in model.named_parameters() if x.requires_grad}
    sgd = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=LR)
    saved |= {f"start.{name}": x.numpy() for name, x in start.items()}
    saved["loss"] = step(model, sgd, ids)
    stepped = {n: x.detach().numpy() for n, x in model.named_parameters() if x.requires_grad}
    saved |= {f"step.{name}": x for name, x in stepped.items()}

    model = adapted(base, start)
    tx = create_loraplus_optimizer(model, torch.optim.SGD, lr=LR, loraplus_lr_ratio=RATIO)
    step(model, tx, ids)
    stepped = {n: x.detach().numpy() for n, x in model.named_parameters() if x.requires_grad}
    saved |= {f"plus.{name}": x for name, x in stepped.items()}

    np.savez_compressed(Path(__file__).with_name("selection.npz"), **saved)


if __name__ == "__main__":
    main()
