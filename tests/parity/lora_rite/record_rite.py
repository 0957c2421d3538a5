"""Record the PyTorch implementation of LoRA-RITE (github.com/gkevinyen5418/LoRA-RITE).

    python -m tests.parity.lora_rite.record_rite path/to/lora_rite.py

writes `rite.npz`: six steps in float64 on the loss sum(weights · (sin(A·B) - target)²), with the
escaped mass of the paper and without the clipping that the implementation adds. The keys are
target and weights `[7, 6]`, a and b at the start, and after_a and after_b after six steps, in this
project's orientation. The implementation keeps A as `[rank, in]` and B as `[out, rank]`.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch

FILE = pathlib.Path(__file__).parent / "rite.npz"
STEPS, RATE, BETAS, EPS = 6, 0.02, (0.9, 0.99), 1e-6


def main(path: str) -> None:
    spec = importlib.util.spec_from_file_location("lora_rite", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    rng = np.random.default_rng(0)
    numbers = {name: rng.normal(size=(7, 6)) for name in ("target", "weights")}
    numbers |= {"a": rng.normal(size=(7, 3)), "b": 0.3 * rng.normal(size=(3, 6))}
    target, weights = (torch.from_numpy(numbers[x]) for x in ("target", "weights"))
    a, b = (torch.nn.Parameter(torch.from_numpy(numbers[x].T.copy())) for x in ("a", "b"))
    optimizer = module.LoRARite(
        [a, b],
        betas=BETAS,
        eps=EPS,
        lr=RATE,
        clip_unmagnified_grad=0.0,
        update_skipping=0.0,
        apply_escape=True,
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (weights * (torch.sin((b @ a).T) - target) ** 2).sum()
        loss.backward()
        optimizer.step()
    numbers |= {"after_a": a.detach().numpy().T, "after_b": b.detach().numpy().T}
    np.savez_compressed(FILE, **numbers)
    FILE.chmod(0o644)
    print(f"{FILE.name}: {len(numbers)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
