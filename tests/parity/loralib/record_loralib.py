"""Record adapters of loralib 0.1.2 (torch 2.13): the oracle of test_loralib.py.

    python -m tests.parity.loralib.record_loralib

writes `loralib.npz`:

    base/<name>            weights under torch's names
    saved                  `lora_state_dict(model, bias="all")`, a safetensors file as bytes
    merged/<name>          the weights and biases that loralib merges them to
    alpha                  4; ranks are 2 and 3
"""

import pathlib

import loralib
import numpy as np
import torch
from safetensors.torch import save
from torch import nn

FILE = pathlib.Path(__file__).parent / "loralib.npz"
ALPHA, WIDTH = 4, 6


def build() -> nn.Module:
    layers = {
        "emb": loralib.Embedding(9, WIDTH, r=2, lora_alpha=ALPHA),
        "up": loralib.Linear(WIDTH, 10, r=3, lora_alpha=ALPHA),
        "c_attn": loralib.MergedLinear(
            WIDTH, 12, r=2, lora_alpha=ALPHA, enable_lora=[True, False, True], fan_in_fan_out=True
        ),
        "qkv": loralib.MergedLinear(WIDTH, 9, r=2, lora_alpha=ALPHA, enable_lora=[True] * 3),
        "cnn": loralib.Conv2d(WIDTH, 5, 3, r=2, lora_alpha=ALPHA),
    }
    model = nn.Module()
    model.h = nn.ModuleDict(layers)
    return model


def main() -> None:
    torch.manual_seed(0)
    model = build().train()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.4 * torch.randn(x.shape))
    weights = {k: x.clone() for k, x in model.state_dict().items() if "lora_" not in k}
    plain = lambda name: name.replace(".conv.", ".")  # as torch's own convolution has it
    saved = {f"base/{plain(name)}": x.numpy() for name, x in weights.items()}
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith("bias"):
                x.add_(1)
    file = save(loralib.lora_state_dict(model, bias="all"))
    model.eval()  # merges
    state = model.state_dict()
    saved |= {f"merged/{plain(name)}": state[name].numpy() for name in weights}
    saved |= {"saved": np.frombuffer(file, np.uint8), "alpha": np.array(ALPHA)}
    np.savez_compressed(FILE, **saved)
    print(f"{FILE.name}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
