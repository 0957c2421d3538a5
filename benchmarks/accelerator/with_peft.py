"""PEFT on the same blocks in PyTorch with CUDA, in a separate process: one figure per call."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.accelerator.size import ADAPTED, Size
from benchmarks.torch_blocks import blocks

#: Name -> (whether the adapters are float32 under autocast, whether `torch.compile` is used).
WAYS = {
    "eager, float32 adapters, autocast": (True, False),
    "eager, bfloat16": (False, False),
    "torch.compile, bfloat16": (False, True),
}
SECONDS = 240  # after which the process is ended


def time_way(size: Size, rank: int, way: str) -> dict[str, Any]:
    """Return the milliseconds of a step; raise RuntimeError with the reason where there is none."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "peft")):
        raise RuntimeError("torch and peft are not both installed")
    command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(size)), str(rank), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "it ended without a word").splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def child(size: Size, rank: int, way: str) -> None:
    """Time steps, and print the figures as JSON."""
    import peft
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch has no CUDA device")
    wide, compiled = WAYS[way]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        blocks = _blocks(size)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ADAPTED))
        model = peft.get_peft_model(blocks, config, autocast_adapter_dtype=wide)
        x = torch.randn(size.batch, size.time, size.width)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    run = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=wide):
            loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    times = []
    for _ in range(size.repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(size.steps):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / size.steps)
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps({"ms": 1e3 * sorted(times)[len(times) // 2], "peak_GB": peak}))


def _blocks(size: Size) -> Any:
    """Return the blocks of `benchmarks.accelerator.blocks` as a module."""
    import torch.nn.functional as F
    from torch import nn

    gated = lambda block, h: block.down(F.silu(block.gate(h)) * block.up(h))
    return nn.Sequential(*blocks(size, gated))


if __name__ == "__main__":
    child(Size(**json.loads(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
